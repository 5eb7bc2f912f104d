"""The command under somebody else's launcher (torchrun, accelerate launch, srun): rank 0 is the runner, and the other
ranks take part in the stages that it announces.

Announcements go through the store that the launcher's ranks share: a follower polls for the next one, so it may wait
for days, and no collective waits with it. A job's number is part of every key, so that nothing of one job is taken for
another's. A follower that fails tells rank 0, which raises that; where rank 0 leaves a job the followers leave it too.
"""

import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from spin_reg import child, errors, stopping
from spin_reg.context import Context
from spin_reg.errors import SpinRegError
from spin_reg.redact import redacted

if TYPE_CHECKING:
    from spin_reg.jobs import Job  # which knows all stages: most verbs want none

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EVERY = 0.5  # seconds between two looks into the store
PATIENCE = {True: 10.0, False: 1.0}  # seconds that rank 0 waits for others to hear of its end, if that is a good one
APART = 5.0  # seconds within which signals are one: the launcher, and whoever signals all its processes, send each


@dataclass
class _Launched:
    """This process among the launcher's; `environment`: what the launcher says to a rank."""

    rank: int = 0
    world: int = 1
    local_world: int = 1
    store: Any = None
    jobs: int = 0
    together: bool = False
    environment: dict[str, str] = field(default_factory=dict)


class _Left(Exception):
    """Rank 0 has left the job."""


_here = _Launched()


def world() -> int:
    """How many processes the launcher has started in all; 1 without one."""
    return _here.world


def local_world() -> int:
    """How many of them are on this machine."""
    return _here.local_world


def main(command: Callable[[], int]) -> int:
    """Run the command, as every process but a follower does; its exit code."""
    if not _began():
        return command()
    if _here.rank > 0:
        return _follow()
    code = 1
    try:
        code = command()
    finally:
        _end(code)
    return code


def _began() -> bool:
    """Whether a launcher has started this process, and others with it; what it says is then taken out of the
    environment until there is a job, since libraries would wait for all ranks wherever they find it.
    """
    if not all(os.environ.get(name) for name in NEEDED) or int(os.environ["WORLD_SIZE"]) < 2:
        return False
    said = {name: value for name, value in os.environ.items() if child.LAUNCHED.match(name)}
    _here.rank, _here.world = int(said["RANK"]), int(said["WORLD_SIZE"])
    _here.local_world = int(said.get("LOCAL_WORLD_SIZE", said["WORLD_SIZE"]))
    _here.environment = said
    stopping.APART = APART
    distributed: Any = importlib.import_module("torch.distributed")
    opened, _, _ = next(distributed.rendezvous("env://"))
    _here.store = distributed.PrefixStore("spin_reg_jobs", opened)
    for name in said:
        del os.environ[name]
    return True


def make_room() -> None:
    """Have the followers drop the models that they keep in memory: another program wants it."""
    if _here.world > 1:
        _announce(None)


def _announce(job: "Job | None") -> int:
    """Tell the followers what is next (None: make room); its number."""
    from spin_reg import jobs

    number = _here.jobs
    _here.jobs += 1
    said = None if job is None else jobs.written(job)
    _here.store.set(f"{number}/job", json.dumps(said, allow_nan=False))
    return number


def run(job: "Job", context: Context) -> None:
    """Make a stage together with the followers, as rank 0.

    Raises:
        SpinRegError: what the stage raises here, or what a follower told.
    """
    number = _announce(job)

    def others() -> None:
        if _here.store.check([f"{number}/failed"]):
            raise errors.heard(json.loads(_here.store.get(f"{number}/failed")))

    try:
        _make(number, job, context, others)
    except BaseException:
        _here.store.set(f"{number}/left", "yes")
        raise


def _make(number: int, job: "Job", context: Context, others: Callable[[], None]) -> None:
    """One rank's part of a job; `others` raises where one of them has left it, in its loops and wherever it waits."""
    from spin_reg import ranks, worker

    context = replace(context, poll=_polling(context.poll, others))

    if not _here.together:
        os.environ.update(_here.environment)
        ranks.join(_here.store)
        _here.together = True
    ranks.begin(str(number), _polling(lambda: None, others))
    ranks.wait(context.poll)
    worker.make(job, context)


def _polling(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Both, the second not too often."""
    last = [0.0]

    def poll() -> None:
        first()
        if time.monotonic() - last[0] > EVERY:
            last[0] = time.monotonic()
            second()

    return poll


def _follow() -> int:
    """Take part in one job after the other until rank 0 ends."""
    with _told_as(_here.rank), stopping.listening():
        try:
            while _await(f"{_here.jobs}/job"):
                _take_part(_here.jobs)
                _here.jobs += 1
        except RuntimeError:  # of the store: rank 0, or who holds it for all, has gone
            return 1
    _here.store.set(f"end/{_here.rank}", "heard")
    return 0


def _await(key: str) -> bool:
    """Wait until the key is there; False where rank 0 has ended."""
    while not _here.store.check([key]):
        if _here.store.check(["end"]):
            return False
        time.sleep(EVERY / 2)
        if stopping.asked() is not None and not _here.store.check([key]):
            _tell(_here.jobs, stopping.stopped())  # of the next job, should rank 0 not have heard
            return False
    return True


def _take_part(number: int) -> None:
    """One job; what goes wrong is told to rank 0."""
    from spin_reg import jobs

    def others() -> None:
        if _here.store.check([f"{number}/left"]):
            raise _Left

    said = json.loads(_here.store.get(f"{number}/job"))
    if said is None:
        from spin_reg import iterates

        return iterates.make_room()
    try:
        job: jobs.Job = jobs.read(jobs.Job, said)
        _make(number, job, Context(poll=stopping.poll), others)
    except _Left:
        return
    except SpinRegError as error:
        _tell(number, error)
    except Exception as error:
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        why = f"{type(error).__name__}: {' '.join(redacted(str(error)).split())[:400] or 'no message'}"
        todo = f"see what rank {_here.rank} has said; mend it and run the same command again"
        what = f"{job.name} failed."
        _tell(number, SpinRegError(what, where=f"rank {_here.rank} of {_here.world}", why=why, todo=todo))


def _tell(number: int, error: SpinRegError) -> None:
    _here.store.set(f"{number}/failed", json.dumps(errors.told(error)))


def _end(code: int) -> None:
    """Rank 0's last word; it may hold the store, so it stays until all have heard."""
    try:
        _here.store.set("end", str(code))
        until, keys = time.monotonic() + PATIENCE[code == 0], [f"end/{rank}" for rank in range(1, _here.world)]
        while not _here.store.check(keys) and time.monotonic() < until:
            time.sleep(EVERY / 10)
    except RuntimeError:
        return  # there is nobody left to tell


@contextmanager
def _told_as(rank: int) -> Iterator[None]:
    """Show a follower's warnings as its own: what all would say rank 0 says."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"spin-reg: rank {rank}: %(message)s"))
    logger = logging.getLogger("spin_reg")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
