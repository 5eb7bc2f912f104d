"""`spin-reg status`: the runs of a folder and how far each is; reads files alone."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from spin_reg import rundir
from spin_reg.console import PIPED_WIDTH
from spin_reg.errors import ConfigError, DamagedError


def show(folder: Path) -> None:
    """Print one row a run.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError("No such folder.", where=str(folder), why="it does not exist", todo="spin-reg status DIR")
    roots = [folder] if (folder / "run.json").exists() else sorted(p.parent for p in folder.glob("*/run.json"))
    table = Table(Column("run", no_wrap=True), "began", "iterates", "stage at work", "heldout_nll by iterate")
    for root in roots:
        try:
            table.add_row(root.name, *_row(root))
        except (DamagedError, ValueError, KeyError, OSError) as error:
            table.add_row(root.name, "", "", "", f"damaged: {type(error).__name__}")
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(highlight=False, width=width).print(table if roots else f"no runs in {folder}")


def _row(root: Path) -> list[str]:
    began = (rundir.provenance(root) or {})["created"][:16]
    iterates = sum(any(p.glob("model/stage.json")) or (p / "base.json").exists() for p in root.glob("iterate-??"))
    working = [str(p.relative_to(root)).removesuffix(".tmp") for p in root.rglob("*.tmp") if p.is_dir()]
    metrics = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(root.glob("iterate-*/evaluate/metrics.json"))]
    return [began, str(iterates), ", ".join(working[:1]), " ".join(f"{m['eval/heldout_nll']:.3f}" for m in metrics)]
