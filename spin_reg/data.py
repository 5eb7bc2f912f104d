"""Data sets: rows split by prompt and turned into token ids, or drawn from the embedded language."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from spin_reg import render, rows, toy
from spin_reg.errors import ConfigError, DataError
from spin_reg.fingerprint import digest, seed_of
from spin_reg.render import Unusable
from spin_reg.rows import Example
from spin_reg.settings import Dataset, Toy
from spin_reg.specs import Split
from spin_reg.tables import Row

LONGEST_TOKEN = 256  # characters; longer than a token of any tokenizer we know of, so more of them are over a limit

Splits = dict[Split, list[Row]]


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    ends: tuple[int, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Splits, dict[str, Any]]:
    """The splits as rows of `tables.EXAMPLES`, and a summary.

    The summary: `rows` in the source, `duplicates` of an earlier row among them (a row without an id whose conversation
    stood before counts once), how many were `looked_at`, every row `dropped` and the `reasons` with their counts.

    Raises:
        DataError: malformed rows (all found in one pass), too few rows, or too many over their limits.
    """
    if isinstance(dataset, Toy):
        return _toy(dataset, tokenizer)
    examples, duplicates = rows.read(dataset)
    splits, summary = _split(dataset, examples, tokenizer, ends, progress)
    return splits, {"rows": len(examples) + duplicates, "duplicates": duplicates} | summary


def _split(
    dataset: Dataset,
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    ends: tuple[int, ...],
    progress: Callable[[int, int], None],
) -> tuple[Splits, dict[str, Any]]:
    """Held-out prompts first in the order of a hash of the prompt, then training rows: a pure function of the prompts.

    All rows of one prompt stand on one side; a held-out prompt gives its first row.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(digest([dataset.seed, "split", example.messages[:-1]]), []).append(example)
    splits: Splits = {Split.train: [], Split.heldout: []}
    faults: dict[int, str] = {}
    reasons: Counter[str] = Counter()
    looked = 0
    for key in sorted(groups):
        if dataset.num_prompts is not None and len(splits[Split.train]) >= dataset.num_prompts:
            break
        held = len(splits[Split.heldout]) < dataset.num_heldout
        for example in groups[key][:1] if held else groups[key]:
            looked += 1
            try:
                row = _tokenised(example, dataset, tokenizer, ends)
                splits[Split.heldout if held else Split.train].append(row)
            except Unusable as fault:
                faults[example.number] = f"row {example.number} ({rows.shown(example.example_id)}): {fault}"
                reasons[str(fault).partition(",")[0]] += 1
        progress(looked, len(examples))
    splits[Split.train] = splits[Split.train][: dataset.num_prompts]
    dropped = [faults[number] for number in sorted(faults)]
    _check_counts(dataset, splits, dropped, looked, len(examples))
    return splits, {"looked_at": looked, "dropped": dropped, "reasons": dict(reasons)}


def _tokenised(example: Example, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Row:
    limits = {"prompt": dataset.max_prompt_tokens, "response": dataset.max_response_tokens}
    *asked, answer = (len(message["content"]) for message in example.messages)
    for (name, limit), length in zip(limits.items(), (sum(asked), answer), strict=True):
        if length > LONGEST_TOKEN * limit:  # known without tokenising megabytes
            most = f"{LONGEST_TOKEN} x {limit}"
            raise Unusable(f"the {name} is over dataset.max_{name}_tokens, {length} characters > {most}")
    prompt, real = render.render(tokenizer, example.messages, ends)
    for (name, limit), ids in zip(limits.items(), (prompt, real), strict=True):
        if len(ids) > limit:
            raise Unusable(f"the {name} is over dataset.max_{name}_tokens, {len(ids)} > {limit}")
    row = {"example_id": example.example_id, "prompt_ids": prompt, "real_ids": real, "data_logprob": None}
    return row | {"prompt": example.messages[-2]["content"], "real": example.messages[-1]["content"]}


def _check_counts(dataset: Dataset, splits: Splits, dropped: list[str], looked: int, total: int) -> None:
    where = f"dataset.path={getattr(dataset, 'path', '')}"
    if len(dropped) > dataset.max_dropped * looked:
        raise DataError(
            f"{len(dropped)} of {looked} rows would be dropped.",
            where=where,
            why=rows.first(dropped),
            todo=f"raise the limit they are over, or dataset.max_dropped (now {dataset.max_dropped:g})",
        )
    train, heldout = len(splits[Split.train]), len(splits[Split.heldout])
    if train < (dataset.num_prompts or 1) or heldout < dataset.num_heldout:
        raise DataError(
            "The data set has too few rows.",
            where=where,
            why=f"of {total} rows ({len(dropped)} dropped), {heldout} prompts are held out and {train} rows are left",
            todo=f"lower dataset.num_prompts (now {dataset.num_prompts}) or dataset.num_heldout "
            f"(now {dataset.num_heldout})",
        )


def _toy(dataset: Toy, tokenizer: PreTrainedTokenizerBase) -> tuple[Splits, dict[str, Any]]:
    """Draws from the embedded language."""
    language = toy_language(dataset, tokenizer)
    assert dataset.num_prompts is not None
    plan = {
        Split.train: (toy.GAME_TOPICS, dataset.num_prompts),
        Split.heldout: (toy.GAME_TOPICS, dataset.num_heldout),
        Split.retained_train: (toy.RETAINED_TOPICS, dataset.num_prompts),
        Split.retained_heldout: (toy.RETAINED_TOPICS, dataset.num_heldout),
    }
    splits: Splits = {}
    for split, (topics, count) in plan.items():
        rng = np.random.default_rng(seed_of("toy draws", dataset.seed, split.value))
        asked = toy.prompts(topics, count, rng)
        splits[split] = [_toy_row(f"{split}-{i:06d}", p, language, tokenizer, rng) for i, p in enumerate(asked)]
    return splits, {"rows": sum(map(len, splits.values())), "duplicates": 0, "dropped": [], "reasons": {}}


def toy_language(dataset: Toy, tokenizer: PreTrainedTokenizerBase) -> toy.Language:
    """The language over this tokenizer's tokens."""
    letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in toy.LETTERS]
    if any(len(ids) != 1 for ids in letters):
        raise ConfigError(
            "The toy language does not fit this model's tokenizer.",
            where="dataset=toy",
            why="it needs one token for each of the letters a to p",
            todo="use dataset=toy with model=tiny, or another data set",
        )
    return toy.Language(
        seed=dataset.seed,
        letters=[ids[0] for ids in letters],
        end=int(tokenizer.eos_token_id),
        vocabulary=len(tokenizer),
        smoothing=dataset.smoothing,
    )


def _toy_row(
    example_id: str, prompt: str, language: toy.Language, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> Row:
    real = language.draw(prompt, rng)
    return {
        "example_id": example_id,
        "prompt_ids": render.prompt_ids(tokenizer, [{"role": "user", "content": prompt}]),
        "real_ids": real,
        "data_logprob": language.logprob(prompt, real),
        "prompt": prompt,
        "real": tokenizer.decode(real[:-1]),
    }
