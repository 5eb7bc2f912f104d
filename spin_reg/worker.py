"""A process that makes one stage: `python -m spin_reg.worker JOB`, alone or as one of the ranks that torchrun starts.

It runs the same code as the runner would, and tells whoever started it how far it is, what it measured and logged, and
how it ended.
"""

import faulthandler
import json
import logging
import math
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from spin_reg import errors, jobs, runner, stopping, usage, wire
from spin_reg.context import Context
from spin_reg.errors import SpinRegError
from spin_reg.jobs import Job
from spin_reg.redact import redacted


def main() -> NoReturn:
    path, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    faulthandler.enable(all_threads=False)  # where native code ends the process, the last words say where it was
    line = wire.Line(path.with_name(wire.NAME), rank)
    logger = logging.getLogger("spin_reg")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)  # what all would say is said once
    logger.addHandler(_Told(line))
    stopping.APART = math.inf  # who has all processes of a job stopped is passed on too; to end at once is not ours
    with stopping.listening():
        try:
            job: Job = jobs.read(Job, json.loads(path.read_text(encoding="utf-8")))
            if job.processes > 1:
                together(job.processes)
            make(job, context(line, rank))
            line.say(done=usage.peak())
        except SpinRegError as error:
            line.say(error=errors.told(error))
        except Exception as error:
            text = redacted("".join(traceback.format_exception(error)))
            line.say(failed=[type(error).__name__, redacted(str(error)), text])
    sys.stderr.flush()
    os._exit(0)  # all is told and on disk; another rank may be in no state to say goodbye to


class _Told(logging.Handler):
    """Log lines go to the one log of the run."""

    def __init__(self, line: wire.Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.say(log=[record.name, record.levelno, self.format(record)])


def context(line: wire.Line, rank: int) -> Context:
    """One rank tells of progress and measures for all."""
    if rank > 0:
        return Context(poll=stopping.poll)
    return Context(
        progress=lambda done, total, unit: line.say(progress=[done, total, unit]),
        log=lambda row: line.say(row=row),
        poll=stopping.poll,
    )


def together(processes: int) -> None:
    """Join the ranks that torchrun has started.

    Raises:
        SpinRegError: there are not as many as were asked for.
    """
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if there != processes:
        raise SpinRegError(
            "Not as many processes as asked for.",
            where=f"hardware.processes={processes}",
            why=f"the launcher has started {there}",
            todo="give hardware.processes as many as it starts; see what it says of its settings",
        )
    from spin_reg import ranks

    ranks.join()


def make(job: Job, context: Context) -> None:
    """Run a job's stage in this process."""
    from spin_reg import models

    models.environment(job.threads)
    usage.begin()
    runner.run_spec(job.spec, {role: Path(folder) for role, folder in job.inputs.items()}, Path(job.out), context)


if __name__ == "__main__":
    main()
