#!/usr/bin/env python3
"""Measure what a tracker costs a training step of the toy: none, W&B offline, and a tracker that hangs.

    python scripts/bench_tracker.py [--rounds N]

Each round trains the same small run under every tracker, in an order that moves on by one, in this process. `none`
stands there twice: the second against the first is the noise. Three ratios to `none`: of the medians, the median over
the same steps of the same rounds, and of the fastest rounds (each step's least time, summed), which a busy machine
disturbs least. Where the noise is larger than what is sought, look at the processor time that W&B takes for a row,
measured outside any run: with a core to itself its thread takes about that from the run's, by the interpreter's lock.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event
from time import perf_counter, process_time
from typing import Any

from hydra import compose, initialize_config_dir

from spin_reg import config, launch, overrides, tracking
from spin_reg.plan import Stage
from spin_reg.runner import State
from spin_reg.settings import Wandb

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "run_name=run",
    "dataset.num_prompts=256",
    "model.sft.epochs=1",
    "schedule.iterations=1",
    "evaluation=none",
    "hardware.threads=1",
]
TRACKERS = {
    "none": ["tracker=none"],
    "none again": ["tracker=none"],
    "W&B offline": ["tracker=wandb"],
    "hangs": ["tracker=tensorboard", "tracker.patience=0"],
}


class Steps:
    """A listener that keeps how long each training step took, in seconds; the first of a stage has no beginning."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def stage(self, index: int, total: int, stage: Stage, state: State) -> None:
        self._last = None

    def progress(self, done: int, total: int, unit: str) -> None:
        now = perf_counter()
        if unit == "step":
            if self._last is not None:
                self.seconds.append(now - self._last)
            self._last = now

    def finished(self, stage: Stage, seconds: float) -> None:
        """Only steps count."""


def steps(name: str) -> list[float]:
    """The step times of one run, SFT's first, then the game's."""
    listener = Steps()
    with TemporaryDirectory() as place:
        settings = config.load(compose("config", [*WORDS, *TRACKERS[name], f"outputs={place}"]))
        with hanging() if name == "hangs" else timed():
            launch.execute(launch.prepare(settings), listener=listener, command=[], overrides=[])
    return listener.seconds


def hang(*args: Any) -> tracking.Mirror:
    Event().wait()
    raise AssertionError


@contextmanager
def hanging() -> Iterator[None]:
    before = tracking._open
    setattr(tracking, "_open", hang)  # noqa: B010
    with timed():
        yield
    setattr(tracking, "_open", before)  # noqa: B010


CALLS: list[float] = []  # seconds that `log` took in the run's thread


@contextmanager
def timed() -> Iterator[None]:
    before = tracking.Background.log

    def log(self: tracking.Background, index: int, row: dict[str, Any]) -> None:
        began = perf_counter()
        before(self, index, row)
        CALLS.append(perf_counter() - began)

    setattr(tracking.Background, "log", log)  # noqa: B010
    yield
    setattr(tracking.Background, "log", before)  # noqa: B010


def wandb_row(rows: int = 1000) -> float:
    """Processor time that this process spends on one row for W&B, in seconds."""
    row = {"iteration": 0, "step": 1} | {f"train/{name}": 0.123456789 for name in "abcdefg"}
    with TemporaryDirectory() as place:
        opened = tracking._open(Path(place), Wandb(), {})
        began = process_time()
        for index in range(rows):
            opened.log(index, row)
        took = process_time() - began
        opened.close(0)
    return took / rows


def fastest(runs: list[list[float]]) -> float:
    """Each step's least time over the runs, summed, in seconds."""
    return float(sum(min(step) for step in zip(*runs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a tracker costs a training step of the toy.")
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    os.environ["WANDB_MODE"] = "offline"
    config.register()
    overrides.register_help(ROOT / "conf")
    names = list(TRACKERS)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        steps("W&B offline")  # the first run imports and warms up
        CALLS.clear()
        for turn in range(rounds):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                seconds[name].append(steps(name))
    print(f"{rounds} rounds of {len(seconds['none'][0])} steps each; median step, ratios to none")
    plain = [second for run in seconds["none"] for second in run]
    for name in names:
        every = [second for run in seconds[name] for second in run]
        paired = median(a / b for a, b in zip(every, plain, strict=True))
        of_medians = median(every) / median(plain)
        print(f"{name:12}{1e3 * median(every):8.2f} ms {of_medians:8.4f} {paired:8.4f} ", end="")
        print(f"{fastest(seconds[name]) / fastest(seconds['none']):8.4f}")
    print(f"log in the run's thread: median {1e6 * median(CALLS):.1f} us, longest {1e6 * max(CALLS):.0f} us")
    print(f"processor time of W&B for a row: {1e6 * wandb_row():.0f} us")
    tracking.leave(0)


if __name__ == "__main__":
    main()
