"""Data sets: rows split by prompt and turned into token ids, or drawn from the embedded language."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from spin_reg import corpora, index, render, rows, toy
from spin_reg.corpora import Corpus, Dataset, Toy
from spin_reg.errors import ConfigError, DataError
from spin_reg.fingerprint import seed_of
from spin_reg.index import Index
from spin_reg.layouts import Example, shown
from spin_reg.render import Unusable
from spin_reg.rows import Progress
from spin_reg.specs import Split
from spin_reg.tables import Row

LONGEST_TOKEN = 256  # characters; longer than a token of any tokenizer we know of, so more of them are over a limit


class Store(Protocol):
    """What rows are appended to, and then read from in that order."""

    def append(self, row: Row, /) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Row]: ...


Splits = dict[Split, Store]


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    ends: tuple[int, ...],
    progress: Progress = lambda done, total, unit: None,
    store: Callable[[str], Store] = lambda name: [],
) -> tuple[Splits, dict[str, Any]]:
    """The splits as rows of `tables.EXAMPLES`, and a summary.

    The summary: `rows` in the source, `duplicates` of an earlier row among them, how many were `looked_at`, every row
    `dropped` and the `reasons` with their counts; and of each of the `parts` what it gave.

    Args:
        store: makes what a split's rows are appended to; a list, or something on disk.

    Raises:
        DataError: malformed rows (all found in one pass), too few rows, or too many over their limits.
    """
    if isinstance(dataset, Toy):
        return _toy(dataset, tokenizer)
    assert isinstance(dataset, Corpus)
    with index.opened(dataset, progress) as found:
        taken = _Taken(dataset, found, {split: store(split.value) for split in (Split.train, Split.heldout)})
        for key, group in found.groups():
            if taken.full():
                break
            side = taken.side(key, found.parts[group[0]])
            if side is not None:
                taken.add(side, group[:1] if side is Split.heldout else group, tokenizer, ends)
            progress(taken.looked, len(found), "row")
        dropped = [taken.faults[i] for i in sorted(taken.faults)]
        _check_dropped(dataset, dropped, taken.looked)
        splits, have = _by_shares(dataset, found, taken, store)
    summary = {"rows": sum(found.read), "duplicates": sum(found.duplicates), "looked_at": taken.looked}
    columns = zip(found.labels, found.read, found.duplicates, taken.dropped, *have.values(), strict=True)
    names = ("source", "rows", "duplicates", "dropped", *have)
    listed = [dict(zip(names, values, strict=True)) for values in columns]
    return splits, summary | {"dropped": dropped, "reasons": dict(taken.reasons), "parts": listed}


class _Taken:
    """What was taken from each part so far, and what there still is room for.

    Held-out prompts first in the order of a hash of the prompt, then training rows: a pure function of the prompts. All
    rows of one prompt stand on one side; a held-out prompt gives its first row.
    """

    def __init__(self, dataset: Corpus, found: Index, splits: dict[Split, Store]) -> None:
        self.dataset, self.found, self.splits = dataset, found, splits
        self.quotas: dict[Split, list[int] | None] = {Split.heldout: corpora.shares(dataset, dataset.num_heldout)}
        self.quotas[Split.train] = None if dataset.num_prompts is None else corpora.shares(dataset, dataset.num_prompts)
        self.have = {split: [0] * len(found.sources) for split in splits}
        self.dropped = [0] * len(found.sources)
        self.faults: dict[int, str] = {}
        self.reasons: Counter[str] = Counter()
        self.looked = 0

    def room(self, split: Split, part: int) -> bool:
        quota = self.quotas[split]
        return quota is None or self.have[split][part] < quota[part]

    def full(self) -> bool:
        return not any(self.room(split, part) for split in self.splits for part in range(len(self.found.sources)))

    def side(self, key: bytes, part: int) -> Split | None:
        """The split that a prompt belongs to; None where there is no room for it there."""
        share = self.dataset.heldout_share
        held = self.room(Split.heldout, part) if share is None else index.number(key) < share
        split = Split.heldout if held else Split.train
        return split if self.room(split, part) else None

    def add(self, split: Split, group: list[int], tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> None:
        for i in group:
            part = self.found.parts[i]
            if not self.room(split, part):
                return
            self.looked += 1
            example = self.found.example(i)
            try:
                row = _tokenised(example, self.dataset, tokenizer, ends)
            except Unusable as fault:
                self.faults[i] = f"{self.found.of_part(i)} ({shown(example.example_id)}): {fault}"
                self.reasons[str(fault).partition(",")[0]] += 1
                self.dropped[part] += 1
                continue
            self.splits[split].append(row | {"source": self.found.labels[part]})
            self.have[split][part] += 1


def _by_shares(
    dataset: Corpus, found: Index, taken: _Taken, store: Callable[[str], Store]
) -> tuple[Splits, dict[Split, list[int]]]:
    """The splits with exactly their shares of each part; where no number was given, as many rows as shares allow."""
    total = dataset.num_prompts or corpora.most(dataset, taken.have[Split.train])
    wanted = {Split.train: corpora.shares(dataset, total), Split.heldout: corpora.shares(dataset, dataset.num_heldout)}
    for split, key in ((Split.heldout, "num_heldout"), (Split.train, "num_prompts")):
        least = 1 if taken.quotas[split] is None else 0  # a part that gives nothing is a mistake
        short = [i for i, count in enumerate(taken.have[split]) if count < max(wanted[split][i], least)]
        if short or not total:
            raise _too_few(dataset, found, taken, split, key, short)
    splits: Splits = dict(taken.splits)
    if taken.have[Split.train] != wanted[Split.train]:
        left = dict(zip(found.labels, wanted[Split.train], strict=True))
        splits[Split.train] = kept = store("train-by-shares")
        for row in taken.splits[Split.train]:
            if left[row["source"]]:
                left[row["source"]] -= 1
                kept.append(row)
    return splits, wanted


def _too_few(dataset: Corpus, found: Index, taken: _Taken, split: Split, key: str, short: list[int]) -> DataError:
    have, now = taken.have, getattr(dataset, key)
    lower = f"lower dataset.num_prompts (now {dataset.num_prompts}) or dataset.num_heldout (now {dataset.num_heldout})"
    if split is Split.heldout and dataset.heldout_share is not None:
        more = f"raise dataset.heldout_share (now {dataset.heldout_share:g}: the share of prompts that never train)"
        lower = f"{more}, or lower dataset.num_heldout (now {dataset.num_heldout})"
    held, left = (sum(have[side]) for side in (Split.heldout, Split.train))
    rows_dropped = f"of {len(found)} rows ({len(taken.faults)} dropped), "
    why = f"{rows_dropped}{held} prompts are held out and {left} rows are left"
    if len(found.sources) > 1:
        quota = corpora.shares(dataset, now or 0)
        lines = [
            f"{found.labels[i]} has {have[split][i]} usable for {split}, and its share is {quota[i]}" for i in short
        ]
        why = "; ".join(lines) or f"{rows_dropped}and the shares allow no row of them"
        lower = f"set dataset.{key} to at most {corpora.most(dataset, have[split])}, or change the weights"
    what = "The data set has too few rows." if len(found.sources) == 1 else "A part of the mixture has too few rows."
    return DataError(what, where=", ".join(source.where for source in found.sources), why=why, todo=lower)


def _check_dropped(dataset: Corpus, dropped: list[str], looked: int) -> None:
    if len(dropped) > dataset.max_dropped * looked:
        raise DataError(
            f"{len(dropped)} of {looked} rows would be dropped.",
            where="dataset.path=" + ", ".join(corpora.label(part) for part in corpora.parts(dataset)),
            why=rows.first(dropped),
            todo=f"mend what they are dropped for, or raise dataset.max_dropped (now {dataset.max_dropped:g})",
        )


def _tokenised(example: Example, dataset: Corpus, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Row:
    limits = {"prompt": dataset.max_prompt_tokens, "response": dataset.max_response_tokens}
    *asked, answer = (len(message["content"]) for message in example.messages)
    for (name, limit), length in zip(limits.items(), (sum(asked), answer), strict=True):
        if length > LONGEST_TOKEN * limit:  # known without tokenising megabytes
            most = f"{LONGEST_TOKEN} x {limit}"
            raise Unusable(f"the {name} is over dataset.max_{name}_tokens, {length} characters > {most}")
    messages = render.fold_system(example.messages) if dataset.fold_system else example.messages
    prompt, real = render.render(tokenizer, messages, ends)
    for (name, limit), ids in zip(limits.items(), (prompt, real), strict=True):
        if len(ids) > limit:
            raise Unusable(f"the {name} is over dataset.max_{name}_tokens, {len(ids)} > {limit}")
    row = {"example_id": example.example_id, "prompt_ids": prompt, "real_ids": real, "data_logprob": None}
    row |= {"prompt": example.messages[-2]["content"], "real": example.messages[-1]["content"]}
    if example.generated is None:
        return row
    return row | _published(example.generated, messages[:-1], tokenizer, ends, real[-1])


def _published(
    answer: str, asked: render.Messages, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], end: int
) -> Row:
    """The published answer, whole; of an empty one the end token is all there is."""
    ids = [end]
    if answer.strip():
        try:
            _, ids = render.render(tokenizer, [*asked, {"role": "assistant", "content": answer}], ends)
        except Unusable as fault:
            raise Unusable(f"generated: {fault}") from fault
    return {"generated_ids": ids, "generated": answer}


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
        "source": None,
    }
