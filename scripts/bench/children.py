"""Children of the bench: started, timed from outside, and their peak memory asked of the system. Standard library only:
on Linux a child's peak begins at its parent's, so this process stays small."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Ended:
    """A child that ended: wall seconds, the peak of its resident set in bytes, its output and exit code."""

    seconds: float
    peak: int
    out: str
    code: int


def environment(threads: int) -> dict[str, str]:
    """The variables of every child: this checkout is what runs, nothing is fetched, no bars are drawn."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return dict(os.environ) | own


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run(words: Sequence[str], *, threads: int, scratch: Path, code: int = 0) -> Ended:
    """`python WORDS` as a child; it must end with this exit code."""
    told = scratch / "child.out"
    with told.open("wb") as out:
        began = perf_counter()
        child = subprocess.Popen([sys.executable, *words], env=environment(threads), stdout=out, stderr=out)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        seconds = perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    text = told.read_text(errors="replace")
    if child.returncode != code:
        sys.exit(f"python {' '.join(words)}\nended with {child.returncode}, not {code}:\n{text[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Ended(seconds, unit * usage.ru_maxrss, text, child.returncode)


class Gemm:
    """A waiting child that measures matrix products."""

    def __init__(self, threads: int, seconds: float) -> None:
        words = [sys.executable, str(HERE / "gemm.py"), str(threads), str(seconds)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(words, env=environment(threads), stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "Gemm":
        self.rates()  # the first one warms up
        return self

    def __exit__(self, *error: object) -> None:
        self._child.communicate()

    def rates(self) -> dict[str, float]:
        """FLOP/s by precision, now."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        found: dict[str, float] = json.loads(self._child.stdout.readline())
        return found


def last_json(text: str) -> Any:
    """The JSON on the last line of an output."""
    return json.loads(text.strip().splitlines()[-1])
