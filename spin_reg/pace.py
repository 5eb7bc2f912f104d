"""How fast a run's stages were, from its log, and what that says of those still to be made."""

import json
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

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
class Piece:
    """A stage of a plan as far as its time goes.

    Attributes:
        folder: relative to the run's. tokens: at most; 0 where tables alone are read, None where nobody counts them.
    """

    name: str
    kind: str
    folder: str
    tokens: int | None


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


def left(pieces: Sequence[Piece], todo: Container[str], text: str) -> Left:
    """What the stages whose names are in `todo` may still take; `text`: the run's log.

    A stage takes seconds in proportion to its tokens, as the timed ones of its kind did; the one that is being made as
    its own first steps did.
    """
    known = timed(text)
    paces: dict[str, list[float]] = {}
    for piece in pieces:
        if piece.name in known and piece.tokens:
            paces.setdefault(piece.kind, [0.0, 0.0])
            paces[piece.kind][0] += known[piece.name].seconds
            paces[piece.kind][1] += piece.tokens
    seconds, missing, counted = 0.0, set(), set()
    for piece in pieces:
        own = known.get(piece.name)
        if piece.name not in todo or piece.tokens == 0:
            continue  # joins and evaluations are tables alone
        if own is not None and own.left:
            seconds += own.seconds * own.left
            counted.add(piece.kind)
        elif piece.tokens and piece.kind in paces:
            took, read = paces[piece.kind]
            seconds += took / read * piece.tokens
            counted.add(piece.kind)
        else:
            missing.add(piece.kind)
    return Left(seconds, tuple(sorted(counted)), tuple(sorted(missing)))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def human(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
