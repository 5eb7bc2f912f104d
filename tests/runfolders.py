"""Run folders written by hand, as far as `report` reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin_reg import durable
from spin_reg.fingerprint import file_sha256

SETTINGS: dict[str, Any] = {
    "model._choice": "tiny",
    "dataset._choice": "toy",
    "regularizer._choice": "none",
    "loss.name": "logistic",
    "seed": 0,
}
KL = {"regularizer._choice": "kl", "regularizer.history": 1}


def stage(folder: Path, files: Mapping[str, Any], spec: Mapping[str, Any] | None = None) -> None:
    """A finished stage with these JSON files."""
    for name, content in files.items():
        durable.make_folder(folder)
        durable.write_json(folder / name, content)
    kept = {name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in files}
    durable.make_folder(folder)
    value = {"fingerprint": "", "spec": dict(spec or {}), "version": 1, "needs": {}, "inputs": {}, "content": ""}
    durable.write_record(folder / "stage.json", value | {"files": kept, "removed": []})


def run(
    root: Path,
    curves: Mapping[str, Sequence[float]],
    settings: Mapping[str, Any] | None = None,
    *,
    iterations: int | None = None,
    data: str = "8badf00d",
    steps: int = 4,
    samples: Sequence[Mapping[str, str]] = (),
    crossplay: Mapping[tuple[int, int], float] | None = None,
    more: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run whose iterates have these metrics, `eval/` before their names, by iterate from the base on.

    Args:
        iterations: planned; else as many as were played.
        data: the hash of the data's file.
        more: further rows of metrics.jsonl.
    """
    count = max((len(values) for values in curves.values()), default=0)
    durable.make_folder(root)
    mine = SETTINGS | dict(settings or {})
    record = {"created": "2026-01-02T03:04:05+00:00", "cwd": "/", "overrides": [], "settings": mine}
    record |= {
        "iterations": max(0, count - 1) if iterations is None else iterations,
        "sources": {"data": {"sha256": [data]}},
    }
    record |= {"versions": {"python": "3.11"}, "command": ["/bin/spin-reg", "tracker=none"]}
    durable.write_record(root / "run.json", record)
    rows: list[dict[str, Any]] = []
    for k in range(count):
        values = {f"eval/{name}": curve[k] for name, curve in curves.items() if k < len(curve)}
        spread = {f"{name}_se": 0.01 * (1 + k) for name in values}
        rows.append({"iterate": k, "iteration": max(0, k - 1), "step": 0, **values, **spread})
        for step in range(1, steps + 1) if k + 1 < count else ():
            rows.append(
                {"iteration": k, "step": step, "train/loss": 0.7 - 0.1 * k - 0.01 * step, "train/margin": 0.1 * k}
            )
        entries = [
            {"discriminator": i, "answers": j, "accuracy": a} for (i, j), a in (crossplay or {}).items() if i == k
        ]
        answered = [{"iterate": k, "finish_reason": "stop", **sample} for sample in samples]
        stage(root / f"iterate-{k:02d}/evaluate", {"crossplay.json": entries, "samples.json": answered})
        if k > 0:
            spec = {"t": k - 1, "window": [k - 1], "reference": {"iterate": k - 1}, "beta": 0.1}
            stage(root / f"iterate-{k:02d}/model", {}, spec)
    if rows or more:
        durable.write_jsonl(root / "metrics.jsonl", [*rows, *(dict(row) for row in more)])
        stage(root / "data", {"summary.json": {"counts": {"train": 24, "heldout": 8}}})
    return root


def damage(path: Path) -> None:
    """A metrics file whose second line is cut."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], *map(json.dumps, map(json.loads, lines[2:]))]) + "\n")
