"""How fast a run's stages were, from its log, and what that says of those still to be made."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spin_reg import estimate
from spin_reg.plan import Stage
from spin_reg.specs import BenchmarkSpec, JudgeSpec, Split

LINE = re.compile(r": (\S+): (took|at|todo) (.+)$", flags=re.M)


@dataclass(frozen=True)
class Timed:
    """Seconds of a whole stage, and how much of it is still to be made (0: none)."""

    seconds: float
    left: float


def timed(text: str) -> dict[str, Timed]:
    """What a run's log says of its stages: those that were made in one go, and the one that is being made."""
    found: dict[str, Timed] = {}
    stopped: set[str] = set()
    for name, word, rest in LINE.findall(text):
        if word == "todo":
            found.pop(name, None)
            stopped.discard(name)
            if "begun" in rest:
                stopped.add(name)
        elif word == "took":
            if name not in stopped:  # else it says how long the rest took
                found[name] = Timed(json.loads(rest)["seconds"], 0.0)
        else:
            at = json.loads(rest)
            whole = at["seconds"] / (at["done"] - at["since"]) * at["total"]
            found[name] = Timed(whole, 1 - at["done"] / at["total"])
    return found


@dataclass(frozen=True)
class Left:
    """Seconds that stages of the kinds that were timed may still take, and the kinds that were not."""

    seconds: float
    timed: tuple[str, ...]
    unknown: tuple[str, ...]

    def words(self) -> str:
        if not self.timed:
            return "nothing left" if not self.unknown else "not known before the first stages have been timed"
        text = f"about {duration(self.seconds)} left, at the pace so far"
        return text + (f"; {', '.join(self.unknown)} not timed yet, and not counted" if self.unknown else "")


def left(stages: Sequence[Stage], todo: Sequence[Stage], rows: Mapping[Split, int], text: str) -> Left:
    """What the stages `todo` may still take.

    A stage takes seconds in proportion to its tokens (`estimate.work`), as the timed ones of its kind did; the one that
    is being made as its own first steps did.
    """
    known = timed(text)
    tokens = {stage.name: estimate.work([stage], rows).tokens for stage in stages}
    paces: dict[str, list[float]] = {}
    for stage in stages:
        if stage.name in known and tokens[stage.name]:
            paces.setdefault(stage.kind, [0.0, 0.0])
            paces[stage.kind][0] += known[stage.name].seconds
            paces[stage.kind][1] += tokens[stage.name]
    seconds, missing, counted = 0.0, set(), set()
    for stage in todo:
        own = known.get(stage.name)
        if not tokens[stage.name] and not isinstance(stage.spec, BenchmarkSpec | JudgeSpec):
            continue  # joins and evaluations are tables alone
        if own is not None and own.left:
            seconds += own.seconds * own.left
            counted.add(stage.kind)
        elif stage.kind in paces:
            took, read = paces[stage.kind]
            seconds += took / read * tokens[stage.name]
            counted.add(stage.kind)
        else:
            missing.add(stage.kind)
    return Left(seconds, tuple(sorted(counted)), tuple(sorted(missing)))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
