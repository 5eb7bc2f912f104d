"""Answers of one iterate, drawn once and kept as token ids."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spin_reg import durable, iterates, sampling, tables, trial, vllm_engine
from spin_reg.context import Context
from spin_reg.fingerprint import seed_of
from spin_reg.generation import Backend
from spin_reg.packing import Group, cut, lengths
from spin_reg.products import plainly
from spin_reg.sampling import Answer
from spin_reg.scorer import Scorer, architecture
from spin_reg.settings import Dtype, Hardware, Precision
from spin_reg.specs import GenerateSpec, Split
from spin_reg.tables import Row, Rows

SHARD = 256  # rows; what a kill costs at most, and the border that no batch crosses
ENGINE = "engine.json"  # which program drew, where it was not this one
SHORT = 32  # tokens of an answer up to which its log-probs are the scorer's, not those it was drawn with
TRIED = 8  # tokens that a new architecture draws before its first answers
_tried: set[str] = set()
Draw = Callable[[Sequence[Row], Callable[[int], None]], Sequence[Answer]]  # (prompts, told how many are ready)


def run(spec: GenerateSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write answers.parquet, one row for every prompt dealt to this iterate, and where `spec.scored` scores.parquet."""
    rows = prompts(spec, inputs["data"] / f"{spec.split}.parquet")
    with ENGINES[spec.generation.backend](spec, inputs, out, context) as (draw, tokenizer):

        def answer(some: Sequence[Row], ready: Callable[[int], None]) -> list[Row]:
            return [
                {
                    "example_id": row["example_id"],
                    "generated_ids": drawn.ids,
                    "finish_reason": drawn.finish_reason,
                    "sampled_from": spec.k,
                    "logprob": math.fsum(drawn.logprobs),
                    "token_logprobs": drawn.logprobs if spec.split is not Split.train else None,
                    "generated": tokenizer.decode(drawn.ids, skip_special_tokens=True),
                }
                for row, drawn in zip(some, draw(some, ready), strict=True)
            ]

        tables.in_shards(
            rows,
            answer,
            out=out,
            into={"answers.parquet": tables.ANSWERS} | ({"scores.parquet": tables.SCORES} if spec.scored else {}),
            size=spec.hardware.shard(SHARD),
            done=lambda done, total: context.progress(done, total, "answer"),
            poll=context.poll,
        )


def prompts(spec: GenerateSpec, path: Path) -> Rows:
    """The prompts dealt to this iterate, as rows with example_id and prompt_ids."""
    rows = tables.read(path, columns=["example_id", "prompt_ids"])
    if spec.draw is None:
        return rows
    dealt = spec.asked(tables.column("example_id", path))
    return Rows(len(dealt), lambda n: rows[dealt[n]])


@contextmanager
def by_transformers(
    spec: GenerateSpec, inputs: dict[str, Path], out: Path, context: Context
) -> Iterator[tuple[Draw, Any]]:
    """Our sampler, and the iterate's tokenizer."""
    accelerator = iterates.accelerator(spec.hardware)
    loaded = iterates.load(inputs["model"], spec.policy)
    model = loaded.model.to(accelerator.device)
    scorer = Scorer(model).eval() if spec.scored else None
    _try_out(model)

    def draw(some: Sequence[Row], ready: Callable[[int], None]) -> list[Answer]:
        names = [row["example_id"] for row in some]
        points = [sampling.uniforms(spec.seed, spec.round, name, spec.split, spec.max_new_tokens) for name in names]
        answers = sampling.sample(
            model,
            [row["prompt_ids"] for row in some],
            torch.stack(points),
            ends=loaded.end_ids,
            temperature=spec.generation.temperature,
            top_p=spec.generation.top_p,
            batch_size=spec.generation.batch_size,
            names=names,
            poll=context.poll,
            ended=ready,
        )
        return answers if scorer is None else _short_scored(scorer, spec.hardware, some, answers, context.poll)

    with accelerator.autocast():  # around all of it, so that weights are cast once
        yield draw, loaded.tokenizer


def _try_out(model: PreTrainedModel) -> None:
    """Once a process for every architecture, since one whose cache is read otherwise gives wrong answers, and no error.

    Raises:
        ConfigError: see `trial.draws`.
    """
    kept = architecture(model)
    if kept in _tried:
        return

    def draw(prompts: Sequence[Sequence[int]]) -> list[trial.Answered]:
        points = torch.stack([sampling.uniforms(0, 0, str(len(prompt)), Split.train, TRIED) for prompt in prompts])
        drawn = sampling.sample(model, prompts, points, ends=(), temperature=1.0, top_p=1.0)
        return [(answer.ids, answer.logprobs) for answer in drawn]

    with plainly(), torch.autocast(model.device.type, enabled=False):
        trial.draws(model, type(model).__name__, draw)
    _tried.add(kept)


@torch.no_grad()  # not inference mode, in which autocast keeps no cast weight
def _short_scored(
    scorer: Scorer, hardware: Hardware, rows: Sequence[Row], answers: Sequence[Answer], poll: Callable[[], None]
) -> list[Answer]:
    """The answers, with the scorer's log-probs of the short ones.

    Drawing rounds otherwise than scoring and training, in float32 by some 1e-5 nats a token; over many tokens that
    averages out.
    """
    made, short = list(answers), [i for i, answer in enumerate(answers) if len(answer.ids) <= SHORT]
    groups = [Group(rows[i]["prompt_ids"], (answers[i].ids,)) for i in short]
    slots = [group.slots for group in groups]
    for picked in cut(slots, tokens=hardware.batch_tokens, most=hardware.score_batch_size):
        poll()
        some = [groups[n] for n in picked]
        for n, values in zip(picked, scorer(some).split(lengths(some)), strict=True):
            made[short[n]] = replace(made[short[n]], logprobs=values.tolist())
    return made


@contextmanager
def by_vllm(spec: GenerateSpec, inputs: dict[str, Path], out: Path, context: Context) -> Iterator[tuple[Draw, Any]]:
    """vLLM in processes of its own, and the iterate's tokenizer; engine.json says which versions of it drew.

    The draws behind an answer depend on (seed, round, example_id) alone, as our sampler's.
    """
    iterates.make_room()  # one model in memory is enough
    tokenizer, ends = iterates.reader(inputs["model"], spec.policy)
    record = out / durable.SCRATCH / ENGINE

    def version(found: str) -> None:
        before = json.loads(record.read_bytes()) if record.exists() else []
        durable.write_json(record, sorted({*before, found}))

    def draw(some: Sequence[Row], ready: Callable[[int], None]) -> list[Answer]:
        seeds = [
            seed_of(spec.seed, spec.round, row["example_id"], "generate", spec.split) % 2**63 for row in some
        ]  # torch takes no more
        answers = engine.draw([row["prompt_ids"] for row in some], seeds, ready)
        return [Answer(ids, reason, []) for ids, reason in answers]

    durable.make_folder(record.parent)
    asked = for_vllm(spec, inputs, ends)
    with vllm_engine.opened(asked, record.parent, poll=context.poll, versions=version) as engine:
        yield draw, tokenizer
    versions = json.loads(record.read_bytes()) if record.exists() else []
    durable.write_json(out / ENGINE, {"engine": "vllm", "versions": versions, "dtype": asked.dtype})


def for_vllm(spec: GenerateSpec, inputs: dict[str, Path], ends: tuple[int, ...]) -> vllm_engine.Asked:
    """What vLLM is asked for: the iterate in the dtype that it is scored in, drawn from as the settings say."""
    found = iterates.for_others(inputs["model"], spec.policy, tokenizer=None)
    fine = spec.hardware.precision is Precision.fp32 and spec.policy.dtype is Dtype.float32
    adapter = None
    if "peft" in found:
        rank = json.loads((Path(found["peft"]) / iterates.ADAPTER).read_bytes())["r"]
        adapter = found["peft"], int(rank)
    return vllm_engine.Asked(
        python=spec.generation.python,
        threads=spec.hardware.threads,
        model=found["pretrained"],
        adapter=adapter,
        dtype=str(Dtype.float32 if fine else Dtype.bfloat16),
        trust_remote_code=spec.policy.trust_remote_code,
        prompt=max(tables.lengths("prompt_ids", inputs["data"] / f"{spec.split}.parquet"), default=0),
        answer=spec.max_new_tokens,
        batch_size=spec.generation.batch_size,
        temperature=spec.generation.temperature,
        top_p=spec.generation.top_p,
        ends=ends,
    )


ENGINES = {Backend.transformers: by_transformers, Backend.vllm: by_vllm}
