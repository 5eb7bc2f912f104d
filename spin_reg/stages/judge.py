"""An iterate's answers before a judge: graded one by one, or compared with the base's."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_reg import asking, durable, judging, questions, tables
from spin_reg.context import Context
from spin_reg.errors import ConfigError
from spin_reg.fingerprint import digest
from spin_reg.judging import Answers, Call, Score, Verdict
from spin_reg.mt_bench import Mode, Prompt, Question
from spin_reg.replies import Cache, Reply
from spin_reg.specs import JudgeSpec

TOO_MANY = 0.05  # of the verdicts; where more cannot be read it is told
log = logging.getLogger(__name__)


def run(spec: JudgeSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write verdicts.jsonl (every call, with the judge's words), results.json and a row of metrics.jsonl."""
    prompt = _prompt(spec)
    asked = questions_of(inputs["questions"], inputs["references"])
    opponent = answers_of(inputs["opponent"]) if spec.mode is Mode.pairwise else None
    calls = judging.calls(spec.judge, prompt, asked, answers_of(inputs["answers"]), opponent)
    found = asking.ask(
        spec.judge,
        calls,
        Cache(Path(spec.cache).expanduser()),
        poll=context.poll,
        progress=lambda done, total: context.progress(done, total, "call"),
    )
    replies = [found[call.key] for call in calls]
    verdicts = [judging.verdict(spec.mode, reply.text) for reply in replies]
    scores = judging.scores(spec.mode, calls, verdicts)
    values, counted = judging.summary(spec.mode, scores), judging.counts(spec.mode, scores, verdicts)
    about = whose(spec, replies) | {"questions": len(asked)} | counted
    durable.write_jsonl(out / "verdicts.jsonl", [line(*one) for one in zip(calls, replies, verdicts, strict=True)])
    durable.write_json(out / "results.json", {"iterate": spec.k} | about | {"results": values})
    durable.write_jsonl(out / "metrics.jsonl", [row(spec, inputs["answers"], values, about)])
    _tell(spec, scores, counted)


def _prompt(spec: JudgeSpec) -> Prompt:
    """The prompt, which must be what the plan said it is."""
    prompt = questions.prompts_of(spec.judge.prompts)[spec.mode]
    if digest(prompt) != spec.prompts:
        why = "they are not what they were when this command began"
        where = f"evaluation.judge.prompts={spec.judge.prompts}"
        raise ConfigError("The judge's prompts have changed.", where=where, why=why, todo="run it again")
    return prompt


def questions_of(asked: Path, references: Path) -> list[Question]:
    """The questions of a run with their references."""
    shown = {
        row["question_id"]: tuple(row["references"]) for row in durable.read_jsonl(references / "references.jsonl")
    }
    rows = durable.read_jsonl(asked / "questions.jsonl")
    return [Question(r["question_id"], r["category"], tuple(r["turns"]), shown[r["question_id"]]) for r in rows]


def answers_of(folder: Path) -> Answers:
    """The texts of an iterate's answers, by question."""
    return {row["question_id"]: row["answers"] for row in tables.read(folder / "answers.parquet")}


def whose(spec: JudgeSpec, replies: Sequence[Reply]) -> dict[str, Any]:
    """Who judged, how and when; `tokens` as the judge counted them, where it did."""
    judge = spec.judge
    asked = {name: getattr(judge, name) for name in ("model", "temperature", "max_tokens", "body", "repeats")}
    times = [reply.time for reply in replies]
    named = sorted({reply.model for reply in replies if reply.model is not None})
    hosts = sorted({reply.host for reply in replies})
    return {
        "mode": spec.mode.value,
        "judge": asked | {"answered_as": named, "hosts": hosts, "prompts_sha256": spec.prompts},
        "time": {"first": min(times), "last": max(times)},
        "tokens": {n: sum(getattr(reply, n) or 0 for reply in replies) for n in ("read", "written")},
        "cut_off": sum(reply.finish_reason == "length" for reply in replies),
    }


def line(call: Call, reply: Reply, verdict: Verdict) -> dict[str, Any]:
    """A call as a row for people."""
    where = {"question_id": call.question_id, "turn": call.turn, "repeat": call.repeat, "flipped": call.flipped}
    said = {"finish_reason": reply.finish_reason, "text": reply.text, "time": reply.time}
    return where | {"value": verdict.value, "fault": verdict.fault} | said


def row(spec: JudgeSpec, answers: Path, values: dict[str, float], about: dict[str, Any]) -> dict[str, Any]:
    """The row of metrics.jsonl. It says nothing of when it was judged, which may differ between equal runs."""
    (at,) = durable.read_jsonl(answers / "metrics.jsonl")
    who = {"judge": spec.judge.model, "mode": spec.mode.value, "repeats": spec.judge.repeats}
    kept = ("questions", "asked", "judged", "unparsable", "wins", "ties", "losses", "inconsistent")
    shown = {name: about[name] for name in kept if name in about}
    return {
        "iterate": spec.k,
        **{n: at[n] for n in ("iteration", "step")},
        **values,
        "task": "mt_bench",
        **who,
        **shown,
    }


def _tell(spec: JudgeSpec, scores: Sequence[Score], counted: dict[str, Any]) -> None:
    """Say it where so many verdicts could not be read that the rest may not stand for all."""
    unread, all_ = counted["unparsable"], counted["verdicts"]
    if unread > TOO_MANY * all_:
        judged = f"{counted['judged']} of {counted['asked']} answers are scored"
        faults = ", ".join(f"{name}: {count}" for name, count in counted["faults"].items())
        log.warning(
            "iterate %d, %s: %d of %d verdicts could not be read (%s), so %s",
            spec.k,
            spec.words,
            unread,
            all_,
            faults,
            judged,
        )
