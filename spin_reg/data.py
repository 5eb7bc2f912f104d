"""Data sets: rows from files or the Hub, checked all at once, split by prompt, and turned into token ids."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from spin_reg import render, toy
from spin_reg.errors import ConfigError, DataError
from spin_reg.fingerprint import digest, seed_of
from spin_reg.redact import redacted
from spin_reg.render import Messages, Unusable
from spin_reg.settings import Dataset, Hub, Jsonl, Toy
from spin_reg.specs import Split
from spin_reg.tables import Row

ROLES = ("system", "user", "assistant")
LAYOUTS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
CONVERSATIONS = ("messages", "real")  # `real` is the column of SPIN's published data
FORMATS = ("parquet", "json", "csv", "arrow", "text")  # of a Hub data set's files
SHOWN = 20  # bad rows named in one error


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the real answer; `number` is its row, from 1."""

    example_id: str
    messages: Messages
    number: int


Splits = dict[Split, list[Row]]


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    ends: tuple[int, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Splits, dict[str, Any]]:
    """The splits as rows of `tables.EXAMPLES`, and a summary with every drop counted.

    Raises:
        DataError: malformed rows (all found in one pass), too few rows, or too many over their limits.
    """
    if isinstance(dataset, Toy):
        return _toy(dataset, tokenizer)
    return _split(dataset, read(dataset), tokenizer, ends, progress)


def read(dataset: Dataset) -> list[Example]:
    """Every row of a file or a Hub data set, checked."""
    if isinstance(dataset, Jsonl):
        where = str(Path(dataset.path).expanduser())
        rows = _file_rows(Path(where))
    else:
        assert isinstance(dataset, Hub)
        where = f"{dataset.path}, split {dataset.split}"
        rows = _hub_rows(dataset)
    return _checked(rows, where)


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from enumerate(pq.read_table(path).to_pylist(), start=1)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                "The data file is not readable Parquet.", where=str(path), why=str(error), todo="mend dataset.path"
            ) from error
        return
    text = path.read_bytes()
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "The data file is not JSON.", where=str(path), why=str(error), todo="mend it, or use .jsonl"
            ) from error
        yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Unusable(f"is not JSON: {error}")


def _hub_rows(dataset: Hub) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset.path, dataset.subset, revision=dataset.revision)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in FORMATS:
            raise ValueError(f"it is made of {kind} files; only {', '.join(FORMATS)} are read: others can hold pickles")
        builder.download_and_prepare()
        table = builder.as_dataset(split=dataset.split)
    except Exception as error:  # the Hub's clients raise a dozen kinds; each means the data are not to be had
        raise DataError(
            "The data set could not be loaded.",
            where=f"dataset.path={dataset.path}, dataset.split={dataset.split}",
            why=f"{type(error).__name__}: {(redacted(str(error)).splitlines() or [''])[0][:200]}",
            todo="check the name, the split, the revision and the network",
        ) from error
    yield from enumerate(table, start=1)


def _checked(rows: Iterator[tuple[int, Any]], where: str) -> list[Example]:
    examples: dict[str, Example] = {}
    faults: list[str] = []
    for number, row in rows:
        try:
            example = _example(row, number)
            twin = examples.setdefault(example.example_id, example)
            if twin is not example and row.get("id") is not None:
                raise Unusable(f"has the id {example.example_id!r} of row {twin.number}")
        except Unusable as fault:
            faults.append(f"row {number} {fault}")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(
            f"{len(faults)} row{'s' if len(faults) > 1 else ''} of the data cannot be read.",
            where=where,
            why="; ".join(faults[:SHOWN]) + more,
            todo="mend or remove these rows (rows are counted from 1)",
        )
    if not examples:
        raise DataError("The data set is empty.", where=where, why="no rows", todo="give a file with rows")
    return list(examples.values())


def _example(row: Any, number: int) -> Example:
    if isinstance(row, Unusable):
        raise row
    if not isinstance(row, dict):
        raise Unusable(f"is a {type(row).__name__}, not an object with fields")
    messages = _messages(row)
    own = row.get("id")
    if own is not None and not isinstance(own, str | int):
        raise Unusable(f"has an id that is a {type(own).__name__}, not text or a whole number")
    return Example(str(own) if own is not None else digest(messages)[:16], messages, number)


def _messages(row: Row) -> Messages:
    for prompt, response in LAYOUTS:
        if prompt in row and response in row:
            asked = _text(row, prompt)
            if prompt == "instruction" and row.get("input"):
                asked = f"{asked}\n\n{_text(row, 'input')}"
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, response)}]
    for key in CONVERSATIONS:
        if key in row:
            return _conversation(row[key], key)
    known = ", ".join("/".join(layout) for layout in LAYOUTS)
    raise Unusable(f"has the fields {sorted(row)}; needed: {known}, or messages")


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise Unusable(f"has a {key} that is {'null' if value is None else type(value).__name__}, not text")
    if not value.strip():
        raise Unusable(f"has an empty {key}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise Unusable(f"has a {key} with half a surrogate pair, which is no text")
    return value


def _conversation(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise Unusable(f"has {key} that are not a list of messages")
    messages: Messages = []
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Unusable(f"has a message {i} in {key} without a role among {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _text(message, "content")})
    turns = [m["role"] for m in messages if m["role"] != "system"]
    if turns[-1:] != ["assistant"] or turns != ["user", "assistant"] * (len(turns) // 2):
        raise Unusable(f"has {key} that do not alternate user, assistant, ..., ending with the assistant's answer")
    return messages


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
    dropped: list[str] = []
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
                dropped.append(f"row {example.number} ({example.example_id}): {fault}")
        progress(looked, len(examples))
    splits[Split.train] = splits[Split.train][: dataset.num_prompts]
    _check_counts(dataset, splits, dropped, looked, len(examples))
    reasons = Counter(line.partition("): ")[2].partition(",")[0] for line in dropped)
    return splits, {"rows": len(examples), "looked_at": looked, "dropped": dropped, "reasons": dict(reasons)}


def _tokenised(example: Example, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Row:
    prompt, real = render.render(tokenizer, example.messages, ends)
    for name, ids, limit in (
        ("prompt", prompt, dataset.max_prompt_tokens),
        ("response", real, dataset.max_response_tokens),
    ):
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
            why="; ".join(dropped[:SHOWN]),
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
    return splits, {"rows": sum(map(len, splits.values())), "dropped": [], "reasons": {}}


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
