"""What benchmarks gave, for people: one row a metric of a task, one column an iterate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from spin_reg import runner
from spin_reg.plan import Stage
from spin_reg.specs import BenchmarkSpec

Row = dict[str, Any]


def benchmarks_table(root: Path, stages: Sequence[Stage]) -> Table | None:
    """The values of these stages with their standard errors; None where no benchmark is among them."""
    judged = [stage for stage in stages if isinstance(stage.spec, BenchmarkSpec)]
    rows = [row for stage in judged for row in runner.stage_rows(root, stage)]
    if not rows:
        return None
    iterates = sorted({row["iterate"] for row in rows})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        for key in (k for k in row if k.startswith("eval/") and not k.endswith("_se")):
            _, task, metric = key.split("/", 2)
            cells.setdefault((f"{task} ({how(row)})", metric), {})[row["iterate"]] = _cell(row, key)
    harness = ", ".join(sorted({str(row["lm_eval"]) for row in rows}))
    table = Table(title=f"lm-eval {harness}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("benchmark")
    table.add_column("metric")
    for k in iterates:
        table.add_column("0 base" if k == 0 else str(k), justify="right")
    for (task, metric), values in cells.items():
        table.add_row(task, metric, *(values.get(k, "") for k in iterates))
    return table


def how(row: Row) -> str:
    """How a task was asked: what is asked in another way is another measurement."""
    version = "" if row["task_version"] is None else f"version {row['task_version']}, "
    chat = ", chat" if row["apply_chat_template"] else ""
    return f"{version}{row['num_fewshot']}-shot{chat}, n={row['items']}"


def _cell(row: Row, key: str) -> str:
    error = row.get(f"{key}_se")
    return f"{row[key]:.3f}" + (f" ({error:.3f})" if error is not None else "")
