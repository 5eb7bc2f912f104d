"""Tables for people in a terminal, lines of tab-separated cells for programs, and paths as both write them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table, without the columns that are empty; piped, a line of the columns' names and one a row, cells
    between tabs, without the title.

    Args:
        right: the columns whose cells are numbers.
    """
    rows = [[_printable(cell) for cell in cells] for cells in rows]
    if not sys.stdout.isatty():
        for cells in (columns, *rows):
            print("\t".join(cells))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    kept = [i for i in range(len(columns)) if any(cells[i] for cells in rows)]
    for name in (columns[i] for i in kept):
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for cells in rows:
        table.add_row(*(cells[i].replace("[", r"\[") for i in kept))
    Console(highlight=False).print(table)


def _printable(cell: str) -> str:
    """Text on one line, and nothing in it that a terminal would obey: models and files may say anything."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(cell.split()))


def say(text: str) -> None:
    """A line for people: nothing where a program reads."""
    if sys.stdout.isatty():
        print(text)


def part(title: str) -> None:
    """Begin a part of several: an empty line and its title, with # before it where a program reads."""
    print(f"\n{title}" if sys.stdout.isatty() else f"# {title}")


def show_json(value: Any, *, line: bool = False) -> None:
    """Print a value as JSON, on one line or indented."""
    print(json.dumps(value, indent=None if line else 1, ensure_ascii=False))


_typed_in: list[Path] = []  # where the command was typed, if the process has moved since


def typed_in(folder: Path | None) -> None:
    """Tell where the command was typed, before the process moves; None: it has not."""
    _typed_in[:] = [] if folder is None else [folder]


def short(path: Path) -> str:
    """A path as one would type it where the command was typed."""
    try:
        return str(path.relative_to(_typed_in[0] if _typed_in else Path.cwd()))
    except ValueError:
        return str(path)
