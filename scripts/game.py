#!/usr/bin/env python3
"""The comparison of regularizers on the embedded game: run folders into CSV, CSV into figures and a table.

python scripts/game.py collect outputs docs/data      game.csv and crossplay.csv
python scripts/game.py draw docs/data docs            game-*.png (extra `figures`), and the table on standard output
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METRICS = ["kl_data", "kl_off", "heldout_nll", "kl_to_base", "accuracy", "length_mean"]
Rows = list[dict[str, str]]
ARMS = {  # in the order of the figures
    "none": ("SPIN", "#444444"),
    "kl 0.25": ("kl 0.25", "#f4a261"),
    "kl 0.5": ("kl 0.5", "#e76f51"),
    "kl 1": ("kl 1", "#a4243b"),
    "mixture_of_two": ("mixture of two", "#2a9d8f"),
    "fictitious_play": ("fictitious play", "#1d6fa5"),
    "base": ("static DPO", "#8d6fb8"),
    "sft": ("continued SFT", "#9a9a9a"),
}


def arm(settings: dict[str, Any]) -> str:
    """What a run is called."""
    if settings["loss.name"] == "sft":
        return "sft"
    name = str(settings["regularizer._choice"])
    return f"kl {settings['regularizer.alpha'][0]:g}" if name == "kl" else name


def collect(outputs: Path, to: Path) -> None:
    """Every iterate of every run as a row, and the mean over seeds of the cross-play matrix."""
    rows, matrix = [], []
    for path in sorted(outputs.glob("*/run.json")):
        settings = json.loads(path.read_text())["settings"]
        beta = settings.get("schedule.beta")
        key = [arm(settings), "" if beta is None else f"{beta[0]:g}", settings["seed"]]
        for file in sorted(path.parent.glob("iterate-??/evaluate/metrics.json")):
            found = json.loads(file.read_text())
            values = [f"{found[f'eval/{name}']:.6g}" if f"eval/{name}" in found else "" for name in METRICS]
            rows.append([*key, int(file.parts[-3][-2:]), *values])
            for entry in json.loads((file.parent / "crossplay.json").read_text()):
                matrix.append([*key, entry["discriminator"], entry["answers"], f"{entry['accuracy']:.6g}"])
    write(to / "game.csv", ["arm", "beta", "seed", "iterate", *METRICS], rows)
    write(to / "crossplay.csv", ["arm", "beta", "seed", "discriminator", "answers", "accuracy"], matrix)


def write(path: Path, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [heads, *sorted(rows, key=lambda row: [str(c) for c in row[:5]])]
        )


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curves(rows: Rows, name: str, beta: str, metric: str) -> list[list[float]]:
    """One list of values by iterate for each seed; a loss without an opponent has no beta."""
    seeds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["arm"] == name and row["beta"] in (beta, "") and row[metric]:
            seeds.setdefault(row["seed"], {})[int(row["iterate"])] = float(row[metric])
    return [[values[k] for k in sorted(values)] for _, values in sorted(seeds.items())]


def instability(values: Sequence[float]) -> float:
    """The sum of all that got worse from one iterate to the next, of a metric where low is good."""
    return sum(max(0.0, b - a) for a, b in zip(values, values[1:], strict=False))


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} ({stdev(values):.2f})"


def table(rows: Rows) -> str:
    """By beta and arm: the last and the best KL to the data, its instability, the last KL off the data."""
    lines = [
        "| beta | arm | seeds | kl_data, last | best | instability | kl_off, last |",
        "|---|---|---|---|---|---|---|",
    ]
    for beta in ("1", "0.1"):
        for name, (label, _) in ARMS.items():
            on, off = curves(rows, name, beta, "kl_data"), curves(rows, name, beta, "kl_off")
            cells = [spread([v[-1] for v in on]), spread([min(v) for v in on]), spread([instability(v) for v in on])]
            lines.append(f"| {beta} | {label} | {len(on)} | {' | '.join([*cells, spread([v[-1] for v in off])])} |")
    return "\n".join(lines)


def by_iterate(rows: Rows, path: Path) -> None:
    """Figure 1: KL to the data and on the retained skill by iterate, mean and standard deviation over seeds."""
    from matplotlib import pyplot as plt

    titles = {"kl_data": "KL(data to iterate): the game", "kl_off": "KL on the retained skill: forgetting"}
    fig, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True, sharex=True)
    for line, (metric, title) in zip(axes, titles.items(), strict=True):
        for ax, beta in zip(line, ("1", "0.1"), strict=True):
            for name, (label, color) in ARMS.items():
                columns = list(zip(*curves(rows, name, beta, metric), strict=True))
                middle, width = [mean(c) for c in columns], [stdev(c) for c in columns]
                ax.plot(range(len(columns)), middle, color=color, label=label, marker="o", ms=3, lw=1.6)
                low, high = ([m + s * w for m, w in zip(middle, width, strict=True)] for s in (-1, 1))
                ax.fill_between(range(len(columns)), low, high, color=color, alpha=0.10, lw=0)
            ax.set_title(f"{title}, beta {beta}", fontsize=10)
            ax.set_ylabel("nats a sequence")
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            if beta == "0.1":
                ax.set_yscale("log")
    for ax in axes[1]:
        ax.set_xlabel("iterate")
    axes[0][0].legend(fontsize=8, frameon=False, ncols=2)
    fig.savefig(path, dpi=120)


def stability(rows: Rows, path: Path) -> None:
    """Figures 2 and 3: instability with the best and the last KL beside it; the last against instability."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for line, beta in zip(axes, ("1", "0.1"), strict=True):
        for i, (name, (label, color)) in enumerate(ARMS.items()):
            on = curves(rows, name, beta, "kl_data")
            worse, last, best = ([f(v) for v in on] for f in (instability, lambda v: v[-1], min))
            line[0].bar(i, mean(worse), yerr=stdev(worse), color=color, width=0.7, error_kw={"lw": 1})
            line[0].plot([i - 0.3, i + 0.3], [mean(last)] * 2, color="black", lw=1.6)
            line[0].plot([i - 0.3, i + 0.3], [mean(best)] * 2, color="black", lw=1.6, ls=":")
            line[1].errorbar(mean(worse), mean(last), stdev(last), stdev(worse), "o", color=color, label=label, lw=1)
        line[0].set_xticks(range(len(ARMS)), [label for label, _ in ARMS.values()], rotation=30, ha="right", fontsize=8)
        line[0].set_title(f"instability of KL to the data (bars), last (line), best (dots), beta {beta}", fontsize=9)
        line[1].set_title(f"last KL against instability, beta {beta}", fontsize=9)
        line[1].set_xlabel("instability, nats")
        for ax in line:
            ax.set_ylabel("nats a sequence")
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        if beta == "0.1":
            line[1].set_xscale("symlog", linthresh=1)
    axes[0][1].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=120)


def matrices(rows: Rows, path: Path) -> None:
    """Figure 4: accuracy of the discriminator that iteration i - 1 trained against answers of iterate j."""
    from matplotlib import pyplot as plt

    shown = [(name, beta) for beta in ("1", "0.1") for name in ("none", "fictitious_play")]
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.6), constrained_layout=True)
    for ax, (name, beta) in zip(axes, shown, strict=True):
        cells: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            if row["arm"] == name and row["beta"] == beta:
                place = int(row["discriminator"]), int(row["answers"])
                cells.setdefault(place, []).append(float(row["accuracy"]))
        size = max(i for i, _ in cells)
        nan = [float("nan")]
        grid = [[mean(cells.get((i, j), nan)) for j in range(size + 1)] for i in range(1, size + 1)]
        drawn = ax.imshow(grid, vmin=0, vmax=1, cmap="RdBu_r")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if value == value:
                    ax.text(j, i, f"{value:.2f}"[-3:], ha="center", va="center", fontsize=7)
        ax.set_yticks(range(size), range(1, size + 1))
        ax.set_title(f"{ARMS[name][0]}, beta {beta}", fontsize=10)
        ax.set_xlabel("answers of iterate")
        ax.set_ylabel("discriminator")
    fig.colorbar(drawn, ax=axes[-1], shrink=0.8, label="accuracy")
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The comparison of regularizers on the embedded game.")
    parser.add_argument("what", choices=("collect", "draw"))
    parser.add_argument("source", type=Path, help="a folder of runs; or of the CSV files")
    parser.add_argument("to", type=Path, help="the folder to write into")
    args = parser.parse_args()
    if args.what == "collect":
        collect(args.source, args.to)
        return
    import matplotlib

    matplotlib.use("Agg")
    rows = read(args.source / "game.csv")
    by_iterate(rows, args.to / "game-by-iterate.png")
    stability(rows, args.to / "game-stability.png")
    matrices(read(args.source / "crossplay.csv"), args.to / "game-crossplay.png")
    print(table(rows))


if __name__ == "__main__":
    main()
