#!/usr/bin/env python3
"""The tables of docs/scaling.md: what an iteration would cost on large models, on paper. Nothing here was run.

python scripts/scaling.py
"""

from collections.abc import Callable
from dataclasses import dataclass

ITERATIONS, EPOCHS, PROMPT, ANSWER, HELDOUT = 3, 2, 256, 512, 1000
FLOPS, HBM = 989e12, 3.35e12  # a second of an H100 SXM: dense bf16, memory (NVIDIA's data sheet)
COMPUTE, MEMORY = (0.3, 0.5), (0.4, 0.7)  # shares of these that are reached: assumptions
PAIRS = 64  # a step, SPIN's batch size
LINKS = {"7B": 450e9, "70B": 50e9}  # bytes a second each way and GPU: NVLink 4 in a node; 400 Gb/s between nodes
DISK = 2e9  # bytes a second, to a shared file system: an assumption
GAMES = ("none", "kl", "fictitious play, fresh", "fictitious play, reuse")


@dataclass(frozen=True)
class Scale:
    """A model and a cluster. `cached`: width of a layer's keys. `replica`: GPUs that draw together, `batch` rows."""

    name: str
    weights: float
    layers: int
    cached: int
    gpus: int
    prompts: int
    replica: int
    batch: int


SCALES = (
    Scale("7B", 7.24e9, 32, 1024, 8, 50_000, 1, 128),
    Scale("70B", 70.6e9, 80, 1024, 64, 1_000_000, 4, 256),
)


def answers(game: str, t: int) -> float:
    """New answers at iteration t, for each prompt (`reuse`: in expectation)."""
    return 1 / (t + 1) if game.endswith("reuse") else 1


def logprobs(game: str, t: int) -> float:
    """Forward scorings at iteration t, for each prompt; in bf16 none comes with drawing."""
    if game == "none":
        return 2
    if game == "kl":
        return 2 if t == 0 else 3
    return t + 2 if game.endswith("fresh") else 3 - 1 / (t + 1)


def drawing(scale: Scale, prompts: float) -> tuple[float, float, float]:
    """FLOPs, bytes read, and seconds at full rates (prompts by compute, tokens by memory) of drawing answers."""
    cache = 4 * scale.layers * scale.cached * (PROMPT + ANSWER / 2)  # bytes of a row, at the middle of its answer
    steps = prompts * ANSWER / scale.batch  # of all replicas together
    moved = steps * (2 * scale.weights + scale.batch * cache)
    seconds = 2 * scale.weights * prompts * PROMPT / (FLOPS * scale.gpus), moved / (HBM * scale.gpus)
    return 2 * scale.weights * prompts * (PROMPT + ANSWER), moved, seconds[0] / COMPUTE[1] + seconds[1] / MEMORY[1]


def rows(scale: Scale, game: str) -> list[tuple[str, float, float, float]]:
    """Of each stage, over all iterations: its name, FLOPs, and hours at best and at worst."""
    drawn = sum(answers(game, t) for t in range(ITERATIONS)) * scale.prompts
    scored = sum(logprobs(game, t) for t in range(ITERATIONS)) * scale.prompts * (PROMPT + ANSWER)
    trained = ITERATIONS * EPOCHS * scale.prompts * (PROMPT + 2 * ANSWER)
    judged = (ITERATIONS + 1) * HELDOUT
    saved = ITERATIONS * 4 * scale.weights / DISK / 3600
    found = [("generate", *_hours(scale, drawn))]
    for name, flops in (("score", 2 * scale.weights * scored), ("train", 8 * scale.weights * trained)):
        best, worst = (flops / (FLOPS * scale.gpus * share) / 3600 for share in reversed(COMPUTE))
        found.append((name, flops, best, worst))
    flops, best, worst = _hours(scale, judged)
    read = 2 * scale.weights * 3 * judged * (PROMPT + ANSWER)  # three log-probs a prompt at most, of none and kl
    more = [read / (FLOPS * scale.gpus * share) / 3600 for share in reversed(COMPUTE)]
    return [*found, ("evaluate", flops + read, best + more[0], worst + more[1]), ("save", 0.0, saved, saved)]


def _hours(scale: Scale, prompts: float) -> tuple[float, float, float]:
    flops, _, best = drawing(scale, prompts)
    return flops, best / 3600, best * max(COMPUTE[1] / COMPUTE[0], MEMORY[1] / MEMORY[0]) / 3600


def stages(scale: Scale) -> str:
    """A table of one scale: stages by game."""
    lines = ["| regularizer | stage | PFLOP | hours |", "|---|---|---|---|"]
    for game in GAMES:
        made = rows(scale, game)
        for name, flops, best, worst in made:
            lines.append(f"| {game} | {name} | {flops / 1e15:.3g} | {best:.2g} to {worst:.2g} |")
        flops, best, worst = (sum(column) for column in list(zip(*(row[1:] for row in made), strict=True)))
        lines.append(f"| {game} | all | {flops / 1e15:.3g} | {best:.2g} to {worst:.2g} |")
    return "\n".join(lines)


def sizes() -> str:
    """A table of bytes."""
    lines = ["| | " + " | ".join(scale.name for scale in SCALES) + " |", "|---|---|---|"]
    kinds: dict[str, Callable[[Scale], float]] = {
        "an iterate in float32, as saved: 4 P": lambda s: 4 * s.weights,
        "an iterate in bfloat16: 2 P": lambda s: 2 * s.weights,
        "training state on one GPU, FSDP2, float32, RMSprop: 12 P / G": lambda s: 12 * s.weights / s.gpus,
        "the model whole in one process, cast copies too: 6 P": lambda s: 6 * s.weights,
        "all iterates that fictitious play keeps: 4 P (iterations + 1)": lambda s: 4 * s.weights * (ITERATIONS + 1),
        "network of a micro-batch, each GPU, FSDP2: 12 P": lambda s: 12 * s.weights,
        "cache of one row at its end: 4 l c (p + r)": lambda s: 4 * s.layers * s.cached * (PROMPT + ANSWER),
        "token ids of an iteration's pairs: 4 N (p + 2 r)": lambda s: 4 * s.prompts * (PROMPT + 2 * ANSWER),
        "index of the rows in one process: 210 N": lambda s: 210 * s.prompts,
    }
    for name, size in kinds.items():
        lines.append(f"| {name} | " + " | ".join(f"{size(scale) / 1e9:.3g} GB" for scale in SCALES) + " |")
    return "\n".join(lines)


def steps() -> str:
    """A table of a training step: seconds of arithmetic and of network on each GPU, not overlapped."""
    lines = [
        "| | steps an iteration | tokens a GPU and step | arithmetic s | network s | all iterations, network alone, h |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for s in SCALES:
        count, tokens = EPOCHS * s.prompts / PAIRS, PAIRS / s.gpus * (PROMPT + 2 * ANSWER)
        best, worst = (8 * s.weights * tokens / (FLOPS * share) for share in reversed(COMPUTE))
        network = 12 * s.weights / LINKS[s.name] * max(1, tokens / 2048)
        lines.append(
            f"| {s.name} | {count:.0f} | {tokens:.0f} | {best:.2g} to {worst:.2g} | {network:.2g} "
            f"| {ITERATIONS * count * network / 3600:.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    for scale in SCALES:
        print(stages(scale), end="\n\n")
    print(sizes(), steps(), sep="\n\n")


if __name__ == "__main__":
    main()
