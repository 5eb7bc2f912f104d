#!/usr/bin/env python3
"""Metrics by iterate, mean and spread over seeds for each regularizer: a Markdown table and a figure.

python scripts/figures.py outputs --iterations 3 --table
python scripts/figures.py outputs --iterations 6 --png docs/unstable.png    (extra `figures`)
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

Curves = dict[str, list[list[float]]]  # regularizer -> one list of values by iterate for each seed


def curves(outputs: Path, iterations: int, metric: str) -> Curves:
    """The runs of a folder with exactly this many iterations."""
    found: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for path in sorted(outputs.glob("*/run.json")):
        settings = json.loads(path.read_text())["settings"]
        files = sorted(path.parent.glob("iterate-??/evaluate/metrics.json"))
        if len(files) == iterations + 1:
            name = settings.get("regularizer._choice", settings["loss.name"])  # sft has no opponent
            name += f" {settings['regularizer.alpha'][0]:g}" if name == "kl" else ""
            found[name][settings["seed"]] = [json.loads(file.read_text())[metric] for file in files]
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in sorted(found.items())}


def table(outputs: Path, iterations: int, metrics: list[str]) -> str:
    """Mean (standard deviation over seeds) by iterate."""
    lines = ["| metric | regularizer | seeds | " + " | ".join(map(str, range(iterations + 1))) + " |"]
    lines.append("|---|---|---|" + "---|" * (iterations + 1))
    for metric in metrics:
        for name, seeds in curves(outputs, iterations, metric).items():
            cells = []
            for values in zip(*seeds, strict=True):
                spread = f" ({stdev(values):.2f})" if len(values) > 1 else ""
                cells.append(f"{mean(values):.2f}{spread}")
            lines.append(f"| {metric.removeprefix('eval/')} | {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(outputs: Path, iterations: int, metrics: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "eval/kl_data": "KL(p_data || iterate): the game",
        "eval/kl_off": "KL on the retained skill: forgetting",
    }
    fig, axes = plt.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 3.4), constrained_layout=True)
    for ax, metric in zip(axes, metrics, strict=True):
        for i, (name, seeds) in enumerate(curves(outputs, iterations, metric).items()):
            means = [mean(values) for values in zip(*seeds, strict=True)]
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in zip(*seeds, strict=True)]
            low = [m - s for m, s in zip(means, spread, strict=True)]
            high = [m + s for m, s in zip(means, spread, strict=True)]
            ax.plot(range(iterations + 1), means, marker="o", ms=3.5, lw=1.6, color=f"C{i}", label=name)
            ax.fill_between(range(iterations + 1), low, high, color=f"C{i}", alpha=0.13, lw=0)
        ax.set_title(titles.get(metric, metric), fontsize=10)
        ax.set_xlabel("iterate")
        ax.set_ylabel("nats a sequence")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Metrics by iterate, mean and spread over seeds.")
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--iterations", type=int, required=True, help="only runs with exactly this many")
    parser.add_argument("--metrics", nargs="+", default=["eval/kl_data", "eval/kl_off"])
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    parser.add_argument("--png", type=Path, help="write the figure here")
    args = parser.parse_args()
    if args.table:
        print(table(args.outputs, args.iterations, args.metrics))
    if args.png:
        figure(args.outputs, args.iterations, args.metrics, args.png)


if __name__ == "__main__":
    main()
