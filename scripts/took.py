#!/usr/bin/env python3
"""What the stages of runs took, from their logs.

    python scripts/took.py outputs/RUN...

For each run one line: seconds by kind of stage, the most memory that its process held, and the bytes of its folder that
no other run shares. A stage taken over from another run took nothing.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

LINE = re.compile(r"(\S+): took (\{.*\})$", flags=re.M)
KINDS = ("data", "sft", "answers", "scores", "pairs", "train", "evaluate")


def kind(stage: str) -> str:
    """The word for a stage's work in its name."""
    parts = stage.split("/")
    if parts[0].startswith("iteration"):
        return parts[1]
    return parts[1] if len(parts) > 1 else parts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="What the stages of runs took, from their logs.")
    parser.add_argument("runs", type=Path, nargs="+")
    print("| run | " + " | ".join(f"{name} s" for name in KINDS) + " | all s | peak memory GB | disk MB |")
    print("|---|" + "---|" * (len(KINDS) + 3))
    for run in parser.parse_args().runs:
        seconds: dict[str, float] = defaultdict(float)
        memory = 0
        for stage, text in LINE.findall((run / "run.log").read_text()):
            took = json.loads(text)
            seconds[kind(stage)] += took["seconds"]
            memory = max(memory, took["peak_memory"])
        files = [path.stat() for path in run.rglob("*") if path.is_file()]
        disk = sum(found.st_size for found in files if found.st_nlink == 1)
        shown = [*(f"{seconds[name]:.1f}" for name in KINDS), f"{sum(seconds.values()):.1f}"]
        shown += [f"{memory / 1e9:.2f}", f"{disk / 1e6:.1f}"]
        print(f"| {run.name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
