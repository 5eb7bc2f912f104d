#!/usr/bin/env python3
"""What `spin-reg plan` says of memory, beside what the stages then hold at most, each in a process of its own.

    python scripts/memory.py                                       (the embedded toy)
    python scripts/memory.py --model FOLDER --data FILE.jsonl      (a real model: LoRA and bfloat16 too)

For each case and kind of stage a line: estimated MB (every row at its limit), measured MB, estimated / measured.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Found:
    """Bytes of a kind of stage."""

    kind: str
    estimated: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured


def plan(words: list[str]) -> dict[str, Any]:
    """What `plan --json` says of memory, by kind of stage."""
    done = subprocess.run([sys.executable, "-m", "spin_reg", "plan", "--json", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["memory"]
    return found


def case(words: list[str], outputs: Path) -> list[Found]:
    """Estimate, then run."""
    words = [*ALWAYS, *words, f"outputs={outputs}"]
    estimated = plan(words)
    made = subprocess.run([sys.executable, "-m", "spin_reg", "train", *words], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr)
    root = outputs / "run"
    made_as = {stage["name"]: stage["kind"] for stage in (json.loads(p.read_text()) for p in root.rglob("stage.json"))}
    measured: dict[str, int] = {}
    for name, text in LINE.findall((root / "run.log").read_text()):
        kind = made_as[name]
        measured[kind] = max(measured.get(kind, 0), json.loads(text)["peak_memory"])
    return [Found(kind, sum(held.values()), measured[kind]) for kind, held in estimated.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory: estimated and measured.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", nargs="+", help="only these")
    args = parser.parse_args()
    cases = CASES if args.model is None else REAL_CASES
    own = TOY if args.model is None else [*REAL, "model=pretrained", f"model.name_or_path={args.model}"]
    own += [] if args.data is None else [f"dataset.path={args.data}"]
    print("| case | stage | estimated MB | measured MB | ratio |\n|---|---|---|---|---|")
    for name in args.cases or cases:
        with tempfile.TemporaryDirectory() as outputs:
            for found in case([*own, *cases[name]], Path(outputs)):
                print(f"| {name} | {found.kind} | {found.estimated / 1e6:.0f} | {found.measured / 1e6:.0f} ", end="")
                print(f"| {found.ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
