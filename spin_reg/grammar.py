"""What the entry of a verb is made of: words, a page, exit codes."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What a word stands for, and so what a shell may offer in its place."""

    run = "run"
    folder = "folder"
    file = "file"
    text = "text"


@dataclass(frozen=True)
class Word:
    """An argument (RUN) or an option (--to) of a verb.

    `value`: what an option is given, as help shows it; none: a flag. `choices`: all that is taken; `offers`: what a
    shell proposes beside them. `needed`: an option that must be given; arguments must, unless they are `optional`.
    """

    name: str
    what: str
    value: str = ""
    kind: Kind = Kind.text
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    needed: bool = False
    optional: bool = False
    many: bool = False

    @property
    def is_option(self) -> bool:
        return self.name.startswith("-")

    def shown(self) -> str:
        return f"{self.name} {self.value}" if self.value else self.name


EXITS = {
    0: "done",
    1: "a failure of spin-reg, or a damaged file",
    2: "the command line or a setting is wrong",
    3: "the data cannot be used",
    4: "another process is at work in the run folder",
    5: "numbers that are not finite",
    6: "the disk has no room",
    75: "stopped by a signal; the same command goes on",
}


@dataclass(frozen=True)
class Verb:
    """`what` is one line; `text` says more. `settings`: it takes key=value, and Hydra completes them; `composed`:
    its --help lists groups and settings too. `shows`: what stands in what it prints.
    `examples`: pairs of a command and what it does. `exits`: its exit codes.
    """

    what: str
    text: str = ""
    words: tuple[Word, ...] = ()
    settings: bool = False
    composed: bool = False
    shows: tuple[tuple[str, str], ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    exits: tuple[int, ...] = (0, 1, 2)
