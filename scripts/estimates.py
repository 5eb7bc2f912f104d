#!/usr/bin/env python3
"""What `spin-reg plan` says of memory, tokens and disk, beside what the stages then hold, read and leave.

    python scripts/estimates.py                                       (the embedded toy)
    python scripts/estimates.py --model FOLDER --data FILE.jsonl      (a real model: LoRA and bfloat16 too)
    python scripts/estimates.py --cases --rows 8 32 256 2000          (tokens and disk alone, by number of prompts)

For each case and kind of stage a line: estimated, measured, estimated / measured, and that of single stages. Memory,
in MB, is that of a plan of nothing done (every row at its limit), beside what the process of a stage held at most.
Tokens, in thousands, and disk, in MB, are those of a first plan with `--prepare`, and once more when iterate 0 has
answered.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

LINE = re.compile(r"(\S+): took (\{.*\})$", flags=re.M)
ALWAYS = ["tracker=none", "hardware.isolate=true", "hardware.threads=1", "schedule.iterations=1", "evaluation=none"]
ALWAYS += ["run_name=run"]
TOY = ["dataset.num_prompts=256", "dataset.num_heldout=16", "schedule.epochs=1"]
REAL = ["dataset=jsonl", "dataset.num_prompts=8", "dataset.num_heldout=2", "dataset.max_response_tokens=160"]
REAL += ["dataset.max_prompt_tokens=192", "dataset.max_dropped=1", "generation.max_new_tokens=48"]
REAL += ["schedule.batch_size=8", "schedule.epochs=2", "hardware.batch_tokens=1024"]
CASES = {
    "fp32": [],
    "bf16": ["hardware.precision=bf16"],
    "checkpointing": ["hardware.gradient_checkpointing=true"],
    "bf16 checkpointing": ["hardware.precision=bf16", "hardware.gradient_checkpointing=true"],
}
REAL_CASES = {
    **{name: [*words, "model.sft.epochs=2"] for name, words in CASES.items()},
    "adamw": ["schedule.optimizer=adamw"],
    "lora": ["model.lora.rank=16"],
    "lora bf16": ["model.lora.rank=16", "hardware.precision=bf16"],
    "bfloat16 weights": ["model.dtype=bfloat16"],
}
GAMES = {  # of which tokens and disk are looked at
    "kl": ["regularizer=kl", "alpha=0.5"],
    "fictitious play": ["regularizer=fictitious_play"],
    "all pairs": ["regularizer=fictitious_play", "regularizer.pairs=union"],
}


@dataclass(frozen=True)
class Found:
    """Of a kind of stage: bytes of memory, tokens, or bytes on disk. `each`: estimated / measured, stage by stage."""

    kind: str
    estimated: float
    measured: float
    each: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured


def plan(words: list[str]) -> dict[str, Any]:
    """What `plan --json` says."""
    done = subprocess.run([sys.executable, "-m", "spin_reg", "plan", "--json", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(words: list[str]) -> None:
    made = subprocess.run([sys.executable, "-m", "spin_reg", "train", *words], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr)


def train_until(path: Path, words: list[str]) -> None:
    """Train, and stop it by a signal once there is a file."""
    command = [sys.executable, "-m", "spin_reg", "train", *words]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not path.exists():
        if running.poll() is not None:
            raise SystemExit(f"it ended before {path} was there: {running.communicate()[1]}")
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    running.communicate()


def case(words: list[str], outputs: Path) -> list[Found]:
    """Memory: estimate, then run."""
    words = [*ALWAYS, *words, f"outputs={outputs}"]
    estimated = plan(words)["memory"]
    train(words)
    root = outputs / "run"
    made_as = {stage["name"]: stage["kind"] for stage in records(root).values()}
    measured: dict[str, int] = {}
    for name, text in LINE.findall((root / "run.log").read_text()):
        kind = made_as[name]
        measured[kind] = max(measured.get(kind, 0), json.loads(text)["peak_memory"])
    return [Found(kind, sum(held.values()), measured[kind]) for kind, held in estimated.items()]


def game(words: list[str], outputs: Path) -> dict[str, list[Found]]:
    """Tokens and disk by kind of stage, and disk of all: estimates of the two plans, then run.

    What the first plan says of a stage that the second finds made is compared all the same.
    """
    words = [*words, "tracker=none", "run_name=run", f"outputs={outputs}"]
    root = outputs / "run"
    plans = {"data prepared": plan(["--prepare", *words])}
    train_until(root / "iterate-00/answers/heldout/stage.json", words)
    plans["iterate 0 answered"] = plan(words)
    train(words)
    folders = {stage["fingerprint"]: folder for folder, stage in records(root).items()}
    stages = {stage["name"]: (folder, stage) for folder, stage in records(root).items()}
    read = {name: tokens(folder, stage, folders) for name, (folder, stage) in stages.items()}
    left = {name: size(folder) for name, (folder, _) in stages.items()}
    found = {}
    for title, planned in plans.items():
        todo = [stage for stage in planned["stages"] if stage["status"] == "todo"]
        for what, measured in (("tokens", read), ("disk", left)):
            a, b, each = Counter[str](), Counter[str](), defaultdict[str, list[float]](list)
            for stage in todo:
                kind, there = stages[stage["name"]][1]["kind"], measured[stage["name"]]
                a[kind] += stage[what]
                b[kind] += there
                each[kind] += [stage[what] / there] if there else []
            rows = [Found(kind, a[kind], b[kind], tuple(each[kind])) for kind in a if b[kind]]
            found[f"{what}, {title}"] = [*rows, Found("all", a.total(), b.total())]
    return found


def records(root: Path) -> dict[Path, dict[str, Any]]:
    """The finished stages of a run, by their folders."""
    return {path.parent: json.loads(path.read_bytes()) for path in root.rglob("stage.json")}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def tokens(folder: Path, stage: Mapping[str, Any], folders: Mapping[str, Path]) -> int:
    """Tokens that a stage drew or read, counted row by row."""
    kind, spec, needs = stage["kind"], stage["spec"], {role: folders[n] for role, n in stage["needs"].items()}
    if kind == "generate":
        return sum(lengths(folder / "answers.parquet", "generated_ids").values())
    if kind == "score":
        data = needs["data"] / f"{spec['split']}.parquet"
        prompts, real = lengths(data, "prompt_ids"), lengths(data, "real_ids")
        rows = pq.read_table(folder / "scores.parquet", columns=["example_id", "sampled_from"]).to_pylist()
        read = sum(prompts[name] for name in {row["example_id"] for row in rows})
        of: dict[int | None, dict[str, int]] = {None: real}
        of |= {source: lengths(path, "generated_ids") for source, path in _answers(needs)}
        return read + sum(of[row["sampled_from"]][row["example_id"]] for row in rows)
    if kind == "sft":
        paths = [path for path in needs["data"].glob("*train.parquet")]
        columns = [lengths(path, name) for path in paths for name in ("prompt_ids", "real_ids")]
        return int(spec["sft"]["epochs"]) * sum(sum(column.values()) for column in columns)
    if kind == "train" and "pairs" not in needs:  # loss=sft
        columns = [lengths(needs["data"] / "train.parquet", name) for name in ("prompt_ids", "real_ids")]
        return int(spec["epochs"]) * sum(sum(column.values()) for column in columns)
    if kind == "train":
        table = pq.read_table(needs["pairs"] / "pairs.parquet")
        names = ("prompt_ids", "real_ids", "generated_ids")
        return int(spec["epochs"]) * sum(len(ids) for name in names for ids in table[name].to_pylist())
    return 0


def _answers(needs: Mapping[str, Path]) -> Iterator[tuple[int, Path]]:
    """The tables of answers among what a stage needs, by the iterate that drew them."""
    for folder in needs.values():
        path = folder / "answers.parquet"
        if path.exists():
            yield json.loads((folder / "stage.json").read_bytes())["spec"]["k"], path


def lengths(path: Path, name: str) -> dict[str, int]:
    """Tokens of each row of a column, by example_id."""
    table = pq.read_table(path, columns=["example_id", name])
    return {str(row["example_id"]): len(row[name]) for row in table.to_pylist()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, tokens and disk: estimated and measured.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", nargs="*", help="only these of memory")
    parser.add_argument("--games", nargs="*", help="only these of tokens and disk")
    parser.add_argument("--rows", nargs="*", type=int, help="prompts to train on, of tokens and disk")
    args = parser.parse_args()
    cases = CASES if args.model is None else REAL_CASES
    own = TOY if args.model is None else [*REAL, "model=pretrained", f"model.name_or_path={args.model}"]
    own += [] if args.data is None else [f"dataset.path={args.data}"]
    print("| case | stage | estimated | measured | ratio | single stages |\n|---|---|---|---|---|---|")
    for name in cases if args.cases is None else args.cases:
        with tempfile.TemporaryDirectory() as outputs:
            show(f"{name}: memory", case([*own, *cases[name]], Path(outputs)), 1e6)
    for name in GAMES if args.games is None else args.games:
        for rows in args.rows or [None]:
            more = [] if rows is None else [f"dataset.num_prompts={rows}"]
            with tempfile.TemporaryDirectory() as outputs:
                for what, found in game([*own, *GAMES[name], *more], Path(outputs)).items():
                    title = f"{name}: {what}" + ("" if rows is None else f", {rows} prompts")
                    show(title, found, 1e3 if what.startswith("tokens") else 1e6)


def show(title: str, found: list[Found], unit: float) -> None:
    for one in found:
        each = f"{min(one.each):.2f} to {max(one.each):.2f}" if one.each else ""
        row = (title, one.kind, f"{one.estimated / unit:.4g}", f"{one.measured / unit:.4g}", f"{one.ratio:.2f}", each)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
