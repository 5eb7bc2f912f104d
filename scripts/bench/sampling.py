"""Measure drawing answers alone: ours, transformers' `generate` and, where there is an interpreter with it, vLLM.

    python scripts/bench/sampling.py outputs/RUN --model FOLDER [--vllm-python /path/to/python]

Every repeat runs each engine once, in turns, on the first prompts of a run, as a child that loads the model before the
clock runs (draw.py). `tok/s` counts the tokens of answers up to their end. vLLM comes from an environment of its own:
its pins do not go with a current transformers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import children
import pyarrow.parquet as pq
from report import markdown, spread

COLUMNS = {"s": "seconds", "tok/s": "rate", "tokens": "tokens", "loading s": "ready"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure drawing answers alone.")
    parser.add_argument("run", type=Path, help="a run folder: its training prompts are answered")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter whose environment has vLLM")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64, help="prompts answered at once")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=int, default=children.cores())
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def drawn(engine: str, python: str, asked: dict[str, Any]) -> dict[str, float]:
    """One engine once, as a child."""
    words, env = [python, str(children.HERE / "draw.py"), engine], children.environment(asked["threads"])
    done = subprocess.run(words, env=env, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, float] = children.last_json(done.stdout)
    return found | {"rate": found["tokens"] / found["seconds"]}


def main() -> None:
    args = arguments()
    rows = pq.read_table(args.run / "data" / "train.parquet", columns=["prompt_ids"])["prompt_ids"].to_pylist()
    asked: dict[str, Any] = {"model": str(args.model.resolve()), "prompts": rows[: args.prompts]}
    asked |= {name: getattr(args, name) for name in ("new_tokens", "batch", "dtype", "threads")}
    engines = {"ours": sys.executable, "generate": sys.executable}
    engines |= {"vllm": str(args.vllm_python)} if args.vllm_python else {}
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for number in range(args.repeats):
        for engine in engines if number % 2 == 0 else reversed(engines):
            print(f"repeat {number + 1} of {args.repeats}: {engine}", file=sys.stderr, flush=True)
            found[engine].append(drawn(engine, engines[engine], asked))
    lines = [["", *COLUMNS, "ours / it"], ["---"] * (len(COLUMNS) + 2)]
    for engine, times in found.items():
        ratios = [a["rate"] / b["rate"] for a, b in zip(found["ours"], times, strict=True)]
        cells = [spread([time[key] for time in times]) for key in COLUMNS.values()]
        lines.append([engine, *cells, spread(ratios, "{:.2f}".format)])
    told = (
        f"{len(rows[: args.prompts])} prompts, batch {args.batch}, at most {args.new_tokens} new tokens, {args.dtype}"
    )
    print(f"{told}, {args.threads} threads, {args.repeats} repeats; medians (least-most)\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
