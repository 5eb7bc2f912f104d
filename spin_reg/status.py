"""`spin-reg status`: how far runs are, and the family tree of one; reads files alone, whoever writes them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spin_reg import manual, sheet, survey
from spin_reg.errors import ConfigError
from spin_reg.pace import duration, human
from spin_reg.survey import Member, Seen

EVERY = 2.0  # seconds between two looks with --watch
COLUMNS = ("run", "state", "iterates", "stages", "at work", "rate", "left", "disk", "heldout_nll", "error")
NUMBERS = ("iterates", "stages", "rate", "left", "disk", "heldout_nll")


def main(words: Sequence[str]) -> int:
    """The verb.

    Raises:
        ConfigError: the folder does not exist, or a word that it does not take.
    """
    given = manual.parsed("status", words)
    folder = existing(Path(given.dir or "outputs"))
    try:
        while True:
            seen = [survey.look(root) for root in survey.roots(folder)]
            alone = (folder / "run.json").exists()
            if given.watch and not given.json:
                sheet.say("\x1b[H\x1b[2J" + time.strftime("%H:%M:%S") + "  Ctrl-C ends this, not the runs\n")
            draw(folder, seen, survey.family(folder) if alone else None, json=given.json, line=given.watch)
            if not given.watch:
                return 0
            time.sleep(EVERY)
    except KeyboardInterrupt:
        if not given.watch:
            raise
        return 0


def existing(folder: Path) -> Path:
    """The folder.

    Raises:
        ConfigError: it does not exist.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError("No such folder.", where=str(folder), why="it does not exist", todo="give a folder of runs")
    return folder


def draw(folder: Path, seen: Sequence[Seen], tree: Sequence[Member] | None, *, json: bool, line: bool) -> None:
    """Print what was seen."""
    if json:
        members = None if tree is None else [asdict(member) for member in tree]
        runs = [asdict(run) | {"tree": members} for run in seen]
        sheet.show_json({"folder": str(folder.resolve()), "runs": runs}, line=line)
        return
    if not seen:
        print(f"no runs in {folder}")
        return
    rows = [cells(run) for run in seen]
    sheet.show(str(folder), COLUMNS, rows, right=NUMBERS)
    if tree:
        print()
        draw_tree(tree)


def cells(run: Seen) -> list[str]:
    """One run in the words of `COLUMNS`."""
    far = f" {run.done}/{run.total} {run.unit or ''}".rstrip() if run.done is not None else ""
    newest = max(run.heldout_nll, default=None) if run.heldout_nll else None
    return [
        run.run,
        run.state + (f" ({run.owner})" if run.owner else ""),
        f"{run.iterates}/{_of(run.iterations, 1)}",
        f"{run.stages_done}/{_of(run.stages_total)}",
        (run.stage or "") + far,
        f"{run.rate:.3g}/s" if run.rate else "",
        ("> " if run.not_timed else "") + duration(run.seconds_left) if run.seconds_left else "",
        human(run.disk) + (f" ({human(run.shared)} shared)" if run.shared else ""),
        f"{run.heldout_nll[newest]:.3f}" if run.heldout_nll and newest is not None else "",
        run.error or "",
    ]


def _of(count: int | None, more: int = 0) -> str:
    return "?" if count is None else str(count + more)


def draw_tree(tree: Sequence[Member]) -> None:
    """Print the family of iterates."""
    columns = ("iterate", "from", "answers by", "log of the reference", "heldout_nll", "reused")
    rows = [
        [
            "0 base" if m.iterate == 0 else str(m.iterate),
            m.made if m.parent is None else str(m.parent) + (" (begun)" if m.made == "at work" else ""),
            answered(m),
            m.reference or "",
            "" if m.heldout_nll is None else f"{m.heldout_nll:.3f}",
            _reused(m.reused),
        ]
        for m in tree
    ]
    sheet.show("", columns, rows, right=("heldout_nll",))


def answered(member: Member) -> str:
    """Who answered, with shares: `pi_1 50 %, pi_0 50 %`."""
    listed = sorted(member.answers.items(), reverse=True)
    if len(listed) < 2 or all(share == 1 for _, share in listed):
        each = " (each all)" if len(listed) > 1 else ""
        return ", ".join(f"pi_{k}" for k, _ in listed) + each
    text = ", ".join(f"pi_{k} {100 * share:.3g} %" for k, share in listed)
    return text + (", kept from before" if member.kept else "")


def _reused(reused: Mapping[str, Sequence[str]]) -> str:
    parts: list[Any] = [f"{len(names)} stages of {run}" for run, names in reused.items()]
    return ", ".join(parts).replace("1 stages", "1 stage") if parts else ""
