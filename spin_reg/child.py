"""A program run beside this process: heard while it works, and ended with it."""

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from threading import Thread

from spin_reg import stopping

EVERY = 0.2  # seconds between two looks at it
PATIENCE = 3.0  # seconds that it has to end when asked to; less than a stopped run has itself
KEPT = 40  # lines
LAUNCHED = re.compile(  # what torchrun and its like tell a rank: a program run beside us is none
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|(GROUP|ROLE|MASTER|TORCHELASTIC)_\w+)$"
)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    poll: Callable[[], None],
    heard: Callable[[str], None] = lambda line: None,
    ask: Callable[[], None] | None = None,
    kill: Callable[[], None] = lambda: None,
) -> tuple[int, list[str]]:
    """Run a program to its end: its exit code (negative: the signal that ended it) and the last lines that it said.

    Args:
        poll: called again and again meanwhile; where it raises, the program and its children are ended first.
        heard: called, between polls, with the line that it said last; lines that overwrite each other count.
        ask: called again and again while a program that knows how to stop is to end, which then takes the time that it
            needs; None: it is sent SIGTERM, and ended where it stays. kill: ends what is not in its process group.
    """
    process = subprocess.Popen(
        command,
        env={name: value for name, value in environment.items() if not LAUNCHED.match(name)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
    )
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=KEPT)
    reader = Thread(target=_read, args=(process.stdout.fileno(), lines), name="child", daemon=True)
    reader.start()

    def end() -> None:
        _signal(process, signal.SIGKILL)
        kill()

    def wait() -> None:
        process.wait()

    with stopping.ending(end), stopping.saving(wait) if ask else nullcontext():
        try:
            while _running(process):
                poll()
                if lines:
                    heard(lines[-1])
        finally:
            _end(process, ask)
            kill()
    reader.join(PATIENCE)
    return process.returncode, list(lines)


def _running(process: "subprocess.Popen[bytes]") -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(EVERY)
    return process.returncode is None


def _end(process: "subprocess.Popen[bytes]", ask: Callable[[], None] | None) -> None:
    """Where it still runs: ask it to end, and end it where it does not; its children with it."""
    if process.poll() is None and ask is not None:
        ask()
        while _running(process):
            ask()
    elif process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        _signal(process, signal.SIGKILL)  # whoever of its group is left
        process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(OSError):
        os.killpg(process.pid, number)


def _read(file: int, lines: deque[str]) -> None:
    """Keep the last lines; a bar that draws itself anew begins a line each time."""
    rest = b""
    while part := os.read(file, 1 << 16):
        *whole, rest = re.split(rb"[\r\n]+", rest + part)
        lines.extend(line.decode(errors="replace").rstrip() for line in whole if line.strip())
    lines.extend([rest.decode(errors="replace")] if rest.strip() else [])
