"""A measurement as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from arithmetic import ROWS, SIDES, STEP, Raw

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
OPTIONS = (
    *("model", "data", "precision", "prompts", "new_tokens", "batch", "micro", "sample_batch", "epochs"),
    "checkpointing",
)


def spread(numbers: Sequence[float], show: Callable[[float], str] = "{:.4g}".format) -> str:
    """The median, and in brackets the least and the most."""
    if len(numbers) < 2:
        return "".join(map(show, numbers))
    return f"{show(median(numbers))} ({show(min(numbers))}-{show(max(numbers))})"


def middle(numbers: Sequence[float], show: Callable[[float], str]) -> str:
    """The median."""
    return show(median(numbers)) if numbers else ""


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def values(repeats: Sequence[Raw], row: str, side: str, key: str) -> list[float]:
    """A number of one side's row in every repeat that has it."""
    return [found[row][key] for found in (repeat[side] for repeat in repeats) if key in found.get(row, {})]


def ratios(repeats: Sequence[Raw], row: str) -> list[float]:
    """Peer against ours in each repeat: seconds a token where both count tokens, else seconds."""
    found = []
    for repeat in repeats:
        ours, peer = (repeat[side].get(row, {}) for side in SIDES)
        if "seconds" in ours and "seconds" in peer:
            a_token = "tokens" in ours and "tokens" in peer
            a, b = (side["seconds"] / (side["tokens"] if a_token else 1) for side in (ours, peer))
            found.append(b / a)
    return found


def table(repeats: Sequence[Raw]) -> str:
    """The measurements as one Markdown table: medians, times and rates with the least and the most in brackets."""
    heads = ["", "ours s", "peer s", "peer / ours", "ours tok/s", "peer tok/s", "ours util.", "peer util."]
    heads += ["ours peak GB", "peer peak GB"]
    lines = [heads, ["---"] * len(heads)]
    for row in ROWS:
        cells = [row, *(spread(values(repeats, row, side, "seconds")) for side in SIDES)]
        cells.append(spread(ratios(repeats, row), "{:.2f}".format))
        cells += [spread(values(repeats, row, side, "tokens_s"), "{:.0f}".format) for side in SIDES]
        for key, show in (("utilisation", percent), ("peak", gigabytes)):
            cells += [middle(values(repeats, row, side, key), show) for side in SIDES]
        lines.append(cells)
    return markdown(lines)


def small_table(heads: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    """Names and the spread of their values."""
    return markdown([heads, ["---"] * len(heads), *([name, spread(found)] for name, found in rows.items())])


def markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(raw: Raw) -> str:
    """All tables of a measurement, under the machine and the options that they hang on."""
    repeats = raw["repeats"]
    steps = {f"{side}": [1 / seconds for seconds in values(repeats, STEP, side, "seconds")] for side in SIDES}
    gemm: dict[str, list[float]] = {}
    for rates in (rates for repeat in repeats for rates in repeat["gemm"]):
        for precision, rate in rates.items():
            gemm.setdefault(precision, []).append(rate / 1e9)
    overheads = {f"spin-reg {command}": seconds for command, seconds in raw["overheads"].items()}
    overheads["the peer's imports"] = [r["peer"]["raw"]["parts"]["imports"]["seconds"] for r in repeats]
    gap = max((repeat["peer"]["raw"]["reference_gap"] for repeat in repeats), default=0.0)
    parts = [
        conditions(raw["machine"], raw["options"]),
        f"{len(repeats)} repeats; medians (least-most); peer: transformers' generate and TRL's DPOTrainer; "
        f"reference log-probs of the two sides differ by at most {gap:.1e} nats",
        table(repeats),
        small_table(["training", "steps a second"], steps),
        small_table(["matrix product", "GFLOP/s"], gemm),
        small_table(["overheads", "s"], overheads),
    ]
    return "\n\n".join(parts)


def conditions(machine: Raw, options: Raw) -> str:
    """The machine, its versions and the options, in two lines."""
    changed = " with changes" if machine.get("changed") else ""
    where = [f"{machine.get('processor', machine['platform'])}, {machine['cores']} cores, {machine['threads']} threads"]
    where.append(", ".join(f"{name} {machine[name]}" for name in PACKAGES if name in machine))
    where.append(f"commit {machine.get('commit', 'unknown')[:12]}{changed}")
    return "; ".join(where) + "\n" + ", ".join(f"{name} {options[name]}" for name in OPTIONS)
