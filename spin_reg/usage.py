"""What a stage takes: seconds, and the most memory that a process held meanwhile."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

SELF = Path("/proc/self")
_others: dict[str, int] = {}  # the peaks of processes that were run for the stage


def begin() -> None:
    """Forget the peak so far, where the system can (Linux)."""
    with suppress(OSError):
        (SELF / "clear_refs").write_text("5")
    _others.clear()
    if _cuda() is not None:
        _cuda().reset_peak_memory_stats()


def heard(peak: dict[str, int]) -> None:
    """Take what another process held at most into account: of several it is the one with most that counts."""
    for name, count in peak.items():
        _others[name] = max(count, _others.get(name, 0))


def peak() -> dict[str, int]:
    """Bytes: `peak_memory`, the resident set's high-water mark since `begin` (where the system cannot forget: since the
    process began), and on a GPU `peak_gpu_memory`, what PyTorch allocated there.
    """
    found = {"peak_memory": _resident()}
    if _cuda() is not None:
        found["peak_gpu_memory"] = int(_cuda().max_memory_allocated())
    return {name: max(found.get(name, 0), _others.get(name, 0)) for name in {**found, **_others}}


def _resident() -> int:
    with suppress(OSError, StopIteration):
        lines = (SELF / "status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cuda() -> Any:
    torch = sys.modules.get("torch")  # never imported for this, nor is a GPU taken that nobody uses here
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
