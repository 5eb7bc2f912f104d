"""An iterate's answers to questions of several turns, each drawn after its own answers to the turns before."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from spin_reg import durable, iterates, ranks, render, sampling, sizes, tables
from spin_reg.context import Context
from spin_reg.errors import DataError
from spin_reg.models import Loaded
from spin_reg.specs import ConverseSpec
from spin_reg.stages.evaluate import position
from spin_reg.tables import Row

SHARD = 20  # questions; what a kill costs at most, and the border that no batch crosses


def run(spec: ConverseSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write answers.parquet, one row a question, and as a row of metrics.jsonl what can be said of them unjudged."""
    rows = durable.read_jsonl(inputs["questions"] / "questions.jsonl")
    accelerator = iterates.accelerator(spec.hardware)
    loaded = iterates.load(inputs["model"], spec.policy)
    loaded.model.to(accelerator.device)

    def answer(some: Sequence[Row], ready: Callable[[int], None]) -> list[Row]:
        return [
            finished(spec, row, said) for row, said in zip(some, converse(spec, loaded, some, context), strict=True)
        ]

    with accelerator.autocast():
        tables.in_shards(
            rows,
            answer,
            out=out,
            into={"answers.parquet": tables.CONVERSATIONS},
            size=spec.hardware.shard(SHARD),
            done=lambda done, total: context.progress(done, total, "question"),
            poll=context.poll,
        )
    if ranks.is_main():
        made = tables.read(out / "answers.parquet")
        durable.write_jsonl(out / "metrics.jsonl", [about(spec, inputs["model"], made)])


def converse(
    spec: ConverseSpec, loaded: Loaded, rows: Sequence[Row], context: Context
) -> list[list[tuple[str, str, int]]]:
    """Each question's answers, turn by turn, as (text, finish reason, tokens).

    The draw behind token j of an answer depends on (seed, turn, question, j) alone.
    """
    said: list[list[tuple[str, str, int]]] = [[] for _ in rows]
    for turn in range(max(len(row["turns"]) for row in rows)):
        going = [i for i, row in enumerate(rows) if turn < len(row["turns"])]
        prompts = {i: prompt(loaded, rows[i], [text for text, _, _ in said[i]]) for i in going}
        groups: dict[tuple[float, int], list[int]] = {}
        for i in going:
            at = spec.temperature_of(rows[i]["category"])
            longest = room(spec, loaded, rows[i]["question_id"], len(prompts[i]))
            groups.setdefault((at, longest), []).append(i)
        for (at, longest), some in groups.items():
            names = [rows[i]["question_id"] for i in some]
            answers = sampling.sample(
                loaded.model,
                [prompts[i] for i in some],
                torch.stack([sampling.uniforms(spec.seed, turn, name, "mt_bench", longest) for name in names]),
                ends=loaded.end_ids,
                temperature=at,
                top_p=1.0,
                batch_size=spec.batch_size,
                names=names,
                poll=context.poll,
            )
            for i, one in zip(some, answers, strict=True):
                text = loaded.tokenizer.decode(one.ids, skip_special_tokens=True)
                said[i].append((text, one.finish_reason, len(one.ids)))
    return said


def prompt(loaded: Loaded, row: Row, said: Sequence[str]) -> list[int]:
    """The conversation so far, by the model's own template, with its generation prompt."""
    messages: render.Messages = []
    for question, answer in zip(row["turns"], said, strict=False):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": row["turns"][len(said)]})
    try:
        return render.prompt_ids(loaded.tokenizer, messages)
    except render.Unusable as fault:
        raise _unusable(row["question_id"], str(fault), "leave it out of the questions") from fault


def room(spec: ConverseSpec, loaded: Loaded, name: str, length: int) -> int:
    """The longest answer that the model's positions leave behind a prompt."""
    positions = sizes.positions_of(loaded.model.config.to_dict())
    longest = spec.max_new_tokens if positions is None else min(spec.max_new_tokens, positions - length)
    if longest < 1:
        why = f"its prompt has {length} tokens, and the model {positions} positions"
        raise _unusable(name, why, "leave it out of the questions, or lower evaluation.mt_bench.max_new_tokens")
    return longest


def _unusable(name: str, why: str, todo: str) -> DataError:
    return DataError("A question cannot be asked.", where=f"MT-Bench, question {name}", why=why, todo=todo)


def finished(spec: ConverseSpec, row: Row, said: Sequence[tuple[str, str, int]]) -> Row:
    """A row of the table of answers."""
    answers, reasons, tokens = zip(*said, strict=True)
    kept = {"question_id": row["question_id"], "category": row["category"]}
    at = spec.temperature_of(row["category"])
    return kept | {"temperature": at, "answers": answers, "finish_reasons": reasons, "tokens": tokens}


def about(spec: ConverseSpec, model: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """eval/mt_bench/answer_tokens: the mean length of an answer; judges like long ones, so look at it beside a score.
    eval/mt_bench/cut_off: the share that reached max_new_tokens, or the model's last position.
    """
    tokens = [count for row in rows for count in row["tokens"]]
    cut = [reason == "length" for row in rows for reason in row["finish_reasons"]]
    values = {"eval/mt_bench/answer_tokens": fmean(tokens), "eval/mt_bench/cut_off": fmean(cut)}
    return {"iterate": spec.k, **position(model), **values, "task": "mt_bench", "items": len(rows)}
