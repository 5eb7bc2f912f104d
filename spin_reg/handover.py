"""The pairs of an iteration as other tools read them: TRL's prompt, chosen, rejected; SPIN's real, generated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin_reg import card, durable, models, render, rundir, tables
from spin_reg.config import Config
from spin_reg.corpora import Corpus
from spin_reg.errors import ConfigError, DataError
from spin_reg.render import Messages, Unusable
from spin_reg.schedules import at
from spin_reg.tables import Row

FILE = "data/train-00000-of-00001.parquet"
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
SCHEMAS = {
    "trl": pa.schema(
        [
            *((name, pa.string()) for name in ("prompt", "chosen", "rejected")),
            *((name, tables.IDS) for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
            *((name, pa.float64()) for name in ("ref_chosen_logps", "ref_rejected_logps")),
            *(("example_id", pa.string()), ("sampled_from", pa.int32()), ("finish_reason", pa.string())),
        ]
    ),
    "spin": pa.schema([("real", MESSAGES), ("generated", MESSAGES)]),
}
TRL_LOSSES = {"logistic": "sigmoid", "hinge": "hinge"}  # those that are the same function in TRL

Conversation = Callable[[Row], Messages]  # of a pair: all that was said, the real answer at the end


@dataclass
class _Count:
    """Rows, and how many of them the other tool tokenises to the ids that were trained on."""

    rows: int = 0
    same: int = 0


def iterations(root: Path) -> dict[int, Path]:
    """The iterations whose pairs are there."""
    found = {}
    for path in sorted(root.glob("iteration-*/pairs.parquet")):
        made = rundir.readable(path.parent)
        if made is not None:
            found[int(path.parent.name.removeprefix("iteration-"))] = path
    return found


def write(
    settings: Config, root: Path, form: str, t: int | None, work: Path, *, name: str, license: str | None
) -> None:
    """Write the pairs of iteration t (None: the last) and their README.md into the folder `work`.

    Raises:
        ConfigError: no such iteration. DataError: the data, which hold the whole conversations, are not as they were.
        DamagedError: the pairs are not.
    """
    there = iterations(root)
    wanted = max(there, default=0) if t is None else t
    if wanted not in there:
        listed = ", ".join(map(str, there)) or "none"
        why, todo = f"with their pairs: {listed}", "spin-reg resume RUN makes what is missing"
        if not settings.loss.plays:
            why, todo = f"loss={settings.loss.name} has no opponent, and so no pairs", "--format hf exports an iterate"
        raise ConfigError("This iteration is not there.", where=f"{root}, --iteration {wanted}", why=why, todo=todo)
    path = there[wanted]
    made = rundir.manifest(path.parent)
    assert made is not None
    rundir.check_hashes(path.parent, made)
    tokenizer = models.load_tokenizer(settings.model)
    pairs, count = tables.read(path), _Count()
    durable.make_folder((work / FILE).parent)
    if form == "trl":
        tables.write(work / FILE, _as_trl(pairs, tokenizer, count), SCHEMAS[form])
        columns, use = _trl_columns(count), _trl_use(settings, wanted, name)
    else:
        with _conversations(settings, root, tokenizer) as conversation:
            tables.write(work / FILE, _as_spin(pairs, tokenizer, conversation, count, settings), SCHEMAS[form])
        columns, use = _spin_columns(count), _spin_use(name)
    text = card.of_pairs(settings, root, wanted, name=name, license=license, columns=columns, use=use)
    durable.write_bytes(work / "README.md", text.encode())


def _as_trl(pairs: Sequence[Row], tokenizer: Any, count: _Count) -> Iterator[Row]:
    for row in pairs:
        prompt = _decoded(tokenizer, row["prompt_ids"])
        bos = tokenizer.bos_token or ""
        if bos and prompt.startswith(bos) and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]:
            prompt = prompt.removeprefix(bos)  # TRL's call of the tokenizer puts it there
        chosen, rejected = (_decoded(tokenizer, row[key]) for key in ("real_ids", "generated_ids"))
        whole = [row["prompt_ids"] + row[key] for key in ("real_ids", "generated_ids")]
        ends = [
            text + ("" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token) for text in (chosen, rejected)
        ]
        count.rows += 1
        count.same += [tokenizer(prompt + text)["input_ids"] for text in ends] == whole
        yield {
            **{"prompt": prompt, "chosen": chosen, "rejected": rejected, "prompt_ids": row["prompt_ids"]},
            **{"chosen_ids": row["real_ids"], "rejected_ids": row["generated_ids"]},
            "ref_chosen_logps": row["reference_real_logprob"],
            "ref_rejected_logps": row["reference_generated_logprob"],
            **{key: row[key] for key in ("example_id", "sampled_from", "finish_reason")},
        }


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _as_spin(
    pairs: Sequence[Row], tokenizer: Any, conversation: Conversation, count: _Count, settings: Config
) -> Iterator[Row]:
    ends = models.end_ids(models.generation_config(settings.model), tokenizer)
    for row in pairs:
        real = conversation(row)
        generated = [*real[:-1], {"role": "assistant", "content": row["generated"]}]
        count.rows += 1
        count.same += _renders_to(tokenizer, generated, ends, settings) == (row["prompt_ids"], row["generated_ids"])
        yield {"real": real, "generated": generated}


def _renders_to(
    tokenizer: Any, messages: Messages, ends: tuple[int, ...], settings: Config
) -> tuple[list[int], list[int]] | None:
    folded = isinstance(settings.dataset, Corpus) and settings.dataset.fold_system
    try:
        return render.render(tokenizer, render.fold_system(messages) if folded else messages, ends)
    except Unusable:
        return None


@contextmanager
def _conversations(settings: Config, root: Path, tokenizer: Any) -> Iterator[Conversation]:
    """The pairs' whole conversations. Pairs keep ids and the last texts, so the data are read again, and must render to
    the very ids.
    """
    data = settings.dataset
    if not isinstance(data, Corpus):
        user = "user"
        yield lambda row: [{"role": user, "content": row["prompt"]}, {"role": "assistant", "content": row["real"]}]
        return
    from spin_reg import index
    from spin_reg.stages.prepare import pinned

    ends = models.end_ids(models.generation_config(settings.model), tokenizer)
    saved = rundir.provenance(root) or {}
    (source,) = saved["sources"]["data"]["sha256"]
    same = pinned(data, source)
    assert isinstance(same, Corpus)
    with index.opened(same) as found:
        places = {found.example(i).example_id: i for i in range(len(found))}

        def conversation(row: Row) -> Messages:
            place = places.get(row["example_id"])
            messages = None if place is None else found.example(place).messages
            if messages is None or _renders_to(tokenizer, messages, ends, settings) != (
                row["prompt_ids"],
                row["real_ids"],
            ):
                why = "it is no more in them" if messages is None else "it no longer renders to the ids trained on"
                raise DataError(
                    "The data are not those of the run any more.",
                    where=f"example {row['example_id']}",
                    why=f"the conversations are read from the data again, and {why}",
                    todo="put the data back as they were; --format trl needs none",
                )
            return messages

        yield conversation


def _trl_columns(count: _Count) -> str:
    return f"""\
- `prompt`, `chosen` (the real answer), `rejected` (the generated one): text as the chat template renders it,
  control tokens written out. TRL's own tokenisation of {count.same} of the {count.rows} rows gives the ids that were
  trained on (an answer that was cut off gets an end token there; what is no text cannot be written as one).
- `prompt_ids`, `chosen_ids`, `rejected_ids`: those ids, which are the truth.
- `ref_chosen_logps`, `ref_rejected_logps`: log r of each answer, nats, summed over exactly these ids.
- `example_id`, `sampled_from` (the iterate that gave the rejected answer), `finish_reason` (of it: stop or length)."""


def _trl_use(settings: Config, t: int, name: str) -> str:
    loss, beta = settings.loss.name.value, at(settings.schedule.beta, t)
    plain = loss in TRL_LOSSES and settings.loss.length_norm.value == "none"
    same = "" if plain else f" The run's own loss ({loss}, length_norm {settings.loss.length_norm.value}) is not TRL's."
    return f"""\
The policy that iteration {t} began with is iterate {t}: `spin-reg export RUN --iterate {t} --to policy`. With
`precompute_ref_log_probs=True` TRL would make references of its own; this takes ours, and the ids as they are.{same}

```python
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class Precomputed(DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # token ids already


policy = "policy"
settings = DPOConfig(output_dir="out", beta={beta:g}, loss_type=["{TRL_LOSSES.get(loss, "sigmoid")}"], max_length=None)
trainer = Precomputed(
    model=AutoModelForCausalLM.from_pretrained(policy),
    args=settings,
    train_dataset=load_dataset({name!r}, split="train"),
    processing_class=AutoTokenizer.from_pretrained(policy),
)
trainer.precompute_ref_logps = True  # read ref_chosen_logps and ref_rejected_logps
trainer.train()
```

Or give the rows to `DPOTrainer` as they are: it then tokenises the text, and its reference is the model it is given."""


def _spin_columns(count: _Count) -> str:
    return f"""\
- `real`: the conversation, the real answer at its end, as messages with `role` and `content`.
- `generated`: the same with the generated answer in its place. Of {count.same} of the {count.rows} rows the text
  renders to the ids that were trained on (a cut-off answer reads as one that ended; what is no text is lost)."""


def _spin_use(name: str) -> str:
    return f"""\
In the layout of what SPIN's authors published: `datasets.load_dataset({name!r}, split="train")`, or spin-reg itself,
which then trains its iteration 0 on these answers (rows that say the same count once):

```text
spin-reg train dataset=spin_iter0 dataset.path={name}
```"""
