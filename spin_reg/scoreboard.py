"""What benchmarks and judges gave, for people: one row a metric, one column an iterate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from spin_reg import runner
from spin_reg.plan import Stage
from spin_reg.specs import BenchmarkSpec, ConverseSpec, JudgeSpec

Row = dict[str, Any]
Cells = dict[tuple[str, ...], dict[int, str]]


def benchmarks_table(root: Path, stages: Sequence[Stage]) -> Table | None:
    """The values of these stages with their standard errors; None where no benchmark is among them."""
    rows = _rows(root, stages, BenchmarkSpec)
    cells: Cells = {}
    for row in rows:
        for key in _metrics(row):
            _, task, metric = key.split("/", 2)
            cells.setdefault((f"{task} ({how(row)})", metric), {})[row["iterate"]] = _cell(row, key)
    harness = ", ".join(sorted({str(row["lm_eval"]) for row in rows}))
    return _table(f"lm-eval {harness}", ("benchmark", "metric"), cells)


def mt_bench_table(root: Path, stages: Sequence[Stage]) -> Table | None:
    """What the judge said, with standard errors over questions, and of how many answers; None where nobody asked it."""
    rows = _rows(root, stages, JudgeSpec)
    cells: Cells = {}
    for row in rows + _rows(root, stages, ConverseSpec) if rows else []:
        for key in _metrics(row):
            cells.setdefault((key.removeprefix("eval/mt_bench/"),), {})[row["iterate"]] = _cell(row, key)
        if "mode" in row:
            judged = f"{row['judged']}/{row['asked']}"
            cells.setdefault((f"answers judged, {row['mode']}",), {})[row["iterate"]] = judged
            if row["unparsable"]:
                unread = cells.setdefault((f"verdicts not read, {row['mode']}",), {})
                unread[row["iterate"]] = str(row["unparsable"])
    judges = ", ".join(sorted({row["judge"] for row in rows}))
    return _table(f"MT-Bench, judged by {judges}", ("metric",), cells)


def _rows(root: Path, stages: Sequence[Stage], kind: type) -> list[Row]:
    judged = [stage for stage in stages if isinstance(stage.spec, kind)]
    return [row for stage in judged for row in runner.stage_rows(root, stage)]


def _metrics(row: Row) -> list[str]:
    return [key for key in row if key.startswith("eval/") and not key.endswith("_se")]


def _table(title: str, columns: tuple[str, ...], cells: Cells) -> Table | None:
    if not cells:
        return None
    iterates = sorted({k for values in cells.values() for k in values})
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in columns:
        table.add_column(column)
    for k in iterates:
        table.add_column("0 base" if k == 0 else str(k), justify="right")
    for names, values in cells.items():
        table.add_row(*names, *(values.get(k, "") for k in iterates))
    return table


def how(row: Row) -> str:
    """How a task was asked: what is asked in another way is another measurement."""
    version = "" if row["task_version"] is None else f"version {row['task_version']}, "
    chat = ", chat" if row["apply_chat_template"] else ""
    return f"{version}{row['num_fewshot']}-shot{chat}, n={row['items']}"


def _cell(row: Row, key: str) -> str:
    error = row.get(f"{key}_se")
    return f"{row[key]:.3f}" + (f" ({error:.3f})" if error is not None else "")
