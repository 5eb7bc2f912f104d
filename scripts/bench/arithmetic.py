"""What a forward costs, and what a run's log says it took. Standard library only."""

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOK = re.compile(r"(\S+): took (\{.*\})$", flags=re.M)
SIDES = ("ours", "peer")
PARTS = ("sampling", "scoring", "training")
STEP, REST, WHOLE = "a training step", "all else: imports, data, pairs", "whole iteration"
ROWS = (*PARTS, STEP, REST, WHOLE)
APART = ("embed", "wte", "wpe", "lm_head", "norm", "bias")  # in the names of what is no matrix between the two ends
Raw = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a model's forward.

    Attributes:
        layers: L. width: of attention, heads * head size. body: weights of the matrices between embedding and head.
        head: vocabulary * hidden size, whether or not it is tied to the embedding.
    """

    layers: int
    width: int
    body: int
    head: int


def shape(folder: Path) -> Shape:
    """The shape of the model in a Hugging Face folder, from its config.json and the headers of its safetensors."""
    config = json.loads((folder / "config.json").read_text())
    sizes = {name: size for path in sorted(folder.glob("*.safetensors")) for name, size in tensors(path).items()}
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        width=heads * (config.get("head_dim") or config["hidden_size"] // heads),
        body=sum(size for name, size in sizes.items() if not any(word in name for word in APART)),
        head=config["vocab_size"] * config["hidden_size"],
    )


def tensors(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: product(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def product(numbers: Iterable[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def forward(model: Shape, tokens: int, logits: int) -> int:
    """FLOPs of a forward over one sequence of `tokens`, with logits at `logits` of its positions.

    2 a weight and token; attention 4 * context * width * layers a token, where the context of the i-th token is the i
    tokens that it sees: causal, so half of what a full square would take.
    """
    seen = tokens * (tokens + 1) // 2
    return 2 * model.body * tokens + 2 * model.head * logits + 4 * model.width * model.layers * seen


def answer(model: Shape, prompt: int, tokens: int) -> int:
    """FLOPs to draw, or to score, an answer of so many tokens: its last token is put into no forward."""
    return forward(model, prompt + max(tokens - 1, 0), tokens)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each pair: its prompt, its real answer, its generated one; `shared`: all prompts begin with so many."""

    prompt: Sequence[int]
    real: Sequence[int]
    generated: Sequence[int]
    shared: int = 0


def shared(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with."""
    first, last = min(prompts), max(prompts)  # what these have in common lies before all in between
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def sampling_work(model: Shape, pairs: Lengths, answers: Sequence[int]) -> tuple[int, int]:
    """FLOPs needed to draw, or to score, the answers, and their tokens; what all prompts begin with is read once."""
    flops = sum(answer(model, p, n) for p, n in zip(pairs.prompt, answers, strict=True))
    return flops - (len(answers) - 1) * forward(model, pairs.shared, 0), sum(answers)


def pairs_work(model: Shape, pairs: Lengths) -> tuple[int, int]:
    """FLOPs needed to read every pair, its prompt once; and the tokens of both rows, the prompt in each."""
    both = [sampling_work(model, pairs, answers) for answers in (pairs.real, pairs.generated)]
    prompts, _ = sampling_work(model, pairs, [0] * len(pairs.prompt))
    return sum(flops for flops, _ in both) - prompts, sum(tokens for _, tokens in both) + 2 * sum(pairs.prompt)


def took(log: str) -> dict[str, Raw]:
    """What a run's log says that each stage took: {stage: {seconds, peak_memory, ...}}."""
    return {stage: json.loads(found) for stage, found in TOOK.findall(log)}


def part(stage: str) -> str:
    """The part of an iteration that a stage belongs to; of data and pairs: all else."""
    kinds = {"answers": "sampling", "scores": "scoring", "train": "training"}
    return next((kinds[word] for word in stage.split("/")[1:2] if word in kinds), REST)


def by_part(stages: dict[str, Raw]) -> dict[str, Raw]:
    """Seconds and peak bytes of the parts, from what the stages took."""
    found: dict[str, Raw] = {}
    for stage, said in stages.items():
        into = found.setdefault(part(stage), {"seconds": 0.0, "peak": 0})
        into["seconds"] += said["seconds"]
        into["peak"] = max(into["peak"], said["peak_memory"])
    return found


def completed(parts: dict[str, Raw], wall: float, peak: int) -> dict[str, Raw]:
    """The rows of a child: its parts, what of its wall time is none of them, and the whole. `peak`: bytes.

    A child that resets its peak at the beginning of a part resets what the system says of it too: the most counts.
    """
    named = {name: parts[name] for name in PARTS}
    rest = {"seconds": wall - sum(found["seconds"] for found in named.values())}
    most = max([peak, *(found["peak"] for found in parts.values() if "peak" in found)])
    return named | {REST: rest, WHOLE: {"seconds": wall, "peak": most}}


def utilisation(flops: float, seconds: float, rate: float) -> float:
    """The share of a measured GEMM rate (FLOP/s) that needed FLOPs make of the seconds they took."""
    return flops / (seconds * rate)
