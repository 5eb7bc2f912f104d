"""The processes that work on one stage together: who this one is, and what they tell each other.

What they tell each other goes as JSON through the store that the process group was made with, which rank 0's side holds
and everybody asks. No collective is at work while one waits for another, so none can time out, however long that takes;
and waiting is polling, so a signal is heard meanwhile. Every rank must make the same calls in the same order. Where
torch.distributed has no group there is one rank, and each call answers at once.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from spin_reg.errors import ConfigError


def _nothing() -> None:
    """Nobody asks to stop."""


EVERY = (0.001, 0.2)  # seconds between two looks into the store: at first, and after a while
_calls = [0]  # how many there were; all ranks count alike, so that a number is one call
_work = [""]  # what they are at
_watch = [_nothing]  # what looks whether all are still at it


def join(store: Any = None) -> None:
    """Make the group of the ranks that a launcher has started, over its store or one that the environment names.

    Raises:
        ConfigError: there are more of them on this machine than GPUs (each says so: others would wait for one that is
            gone); or which of them this is was not said.
    """
    import torch
    from torch import distributed

    which: dict[str, Any] = (
        {} if store is None else {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_place(torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, **which)
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # a tracker may have made it for one process
    PartialState(cpu=backend == "gloo")


def _place(there: int) -> int:
    """Which of the GPUs of this machine is this process's own."""
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "Which GPU is this process's own was not said.",
            where="LOCAL_RANK in the environment",
            why="RANK and WORLD_SIZE are there, so a launcher has started it",
            todo="start it by torchrun or accelerate launch, or set LOCAL_RANK and LOCAL_WORLD_SIZE too",
        )
    place = int(os.environ["LOCAL_RANK"])
    processes = max(place + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if processes > there:
        raise ConfigError(
            "There are more processes than GPUs.",
            where=f"{processes} processes on this machine",
            why=f"it shows {there} GPUs, and each process has one to itself",
            todo=f"start {there} (hardware.processes={there}), or see CUDA_VISIBLE_DEVICES",
        )
    return place


def begin(work: str, watch: Callable[[], None] = _nothing) -> None:
    """Begin another piece of work under a name of its own: some may have left the last one early.

    Args:
        watch: called in every wait of this work; what it raises ends that, so that none waits for who has left.
    """
    _work[0], _calls[0], _watch[0] = work, 0, watch


def rank() -> int:
    """This process among those that work together, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def world() -> int:
    """How many work together."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def is_main() -> bool:
    """Whether this is the one that does what must be done once."""
    return rank() == 0


def gathered(value: Any, poll: Callable[[], None] = _nothing) -> list[Any]:
    """Every rank's value, in the order of ranks; values are what JSON holds.

    Args:
        poll: called again and again while others are waited for; what it raises ends the wait.
    """
    if world() == 1:
        return [value]
    store, call = _store(), _calls[0]
    _calls[0] += 1
    store.set(_key(call, rank()), json.dumps(value))
    keys = [_key(call, r) for r in range(world())]
    _await(lambda: bool(store.check(keys)), poll)
    found = [json.loads(store.get(key)) for key in keys]
    if call:  # all have come here, so all have read what was told in the call before
        store.delete_key(_key(call - 1, rank()))
    return found


def from_main(value: Any, poll: Callable[[], None] = _nothing) -> Any:
    """Rank 0's value; what the others give is not looked at."""
    return gathered(value if is_main() else None, poll)[0]


def wait(poll: Callable[[], None] = _nothing) -> None:
    """Until all ranks are here."""
    gathered(None, poll)


def _group() -> Any:
    """torch.distributed, if this process has a group; never imported for this, since without it there is none."""
    found = sys.modules.get("torch.distributed")
    return found if found is not None and found.is_available() and found.is_initialized() else None


def _store() -> Any:
    """What the group was made with."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _key(call: int, who: int) -> str:
    return f"spin_reg/{_work[0]}/{call}/{who}"


def _await(there: Callable[[], bool], poll: Callable[[], None]) -> None:
    pause, longest = EVERY
    while not there():
        poll()
        _watch[0]()
        time.sleep(pause)
        pause = min(2 * pause, longest)
