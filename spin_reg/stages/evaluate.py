"""What is reported of an iterate: pure arithmetic over held-out tables that other stages made."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spin_reg import durable, join, tables
from spin_reg.context import Context
from spin_reg.settings import LengthNorm
from spin_reg.specs import EvaluateSpec, Split, generated_role, real_role

Values = dict[str, float]


def run(spec: EvaluateSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write metrics.json, the same as a row of metrics.jsonl, and samples.json."""
    values = likelihood(inputs, spec.k) | answers_look(inputs["own"]) | divergences(spec, inputs)
    if spec.game is not None and spec.beta is not None:
        values |= game(spec, inputs)
    durable.write_json(out / "metrics.json", values)
    row = {"iterate": spec.k, **position(inputs["model"]), **values}
    durable.write_jsonl(out / "metrics.jsonl", [row])
    durable.write_json(out / "samples.json", samples(spec, inputs))


def position(model: Path) -> dict[str, int]:
    """Where on the (iteration, step) axis this iterate stands: the last step that made it; (0, 0) for the base."""
    path = model / "metrics.jsonl"
    last = durable.read_jsonl(path)[-1:] if path.exists() else []
    played = last and last[0]["iteration"] >= 0
    return {key: last[0][key] if played else 0 for key in ("iteration", "step")}


def likelihood(inputs: Mapping[str, Path], k: int) -> Values:
    """Held-out likelihood of the real answers.

    eval/heldout_nll: nats a token; lower is better. eval/heldout_real_logprob: nats a sequence (mean of sums).
    eval/kl_data: KL(p_data || pi_k) in nats a sequence, the mean of log p_data(y) - log pi_k(y) over draws y from
    p_data, where p_data is known: unbiased; eval/kl_data_se is its standard error. eval/kl_off: the same on the
    retained skill, which self-play does not see: forgetting. Both should fall, or at least not rise.
    """
    path = inputs["data"] / f"{Split.heldout}.parquet"
    scored = join.scores(inputs[real_role(k)], None)
    logprobs = [scored[name] for name in tables.column("example_id", path)]
    tokens = sum(tables.lengths("real_ids", path))
    values = {
        "eval/heldout_nll": -math.fsum(logprobs) / tokens,
        "eval/heldout_real_logprob": math.fsum(logprobs) / len(logprobs),
    }
    if tables.column("data_logprob", path)[0] is not None:
        values |= _kl("eval/kl_data", tables.numbers_by_id("data_logprob", path), scored)
        retained = inputs["data"] / f"{Split.retained_heldout}.parquet"
        known = tables.numbers_by_id("data_logprob", retained)
        values |= _kl("eval/kl_off", known, join.scores(inputs["retained"], None))
    return values


def _kl(name: str, known: Mapping[str, float], scored: Mapping[str, float]) -> Values:
    gaps = np.array([known[example_id] - scored[example_id] for example_id in known])
    return {name: float(gaps.mean()), f"{name}_se": float(gaps.std(ddof=1) / math.sqrt(len(gaps)))}


def answers_look(folder: Path) -> Values:
    """eval/length_mean: tokens an answer, drawn at temperature 1; eval/cutoff_share: answers that reached no end."""
    path = folder / "answers.parquet"
    return {
        "eval/length_mean": float(np.mean(tables.lengths("generated_ids", path))),
        "eval/cutoff_share": float(np.mean([reason == "length" for reason in tables.column("finish_reason", path)])),
    }


def divergences(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> Values:
    """eval/kl_to_base and eval/kl_to_previous: KL(pi_k || pi_q) in nats a sequence, along answers of pi_k itself.

    The sum over tokens of k3 = exp(l) - 1 - l, l = log pi_q - log pi_k of a token: never negative, and unbiased for the
    token's KL (Schulman's estimator). 0 for the base against itself; small steps keep both small.
    """
    own = join.token_logprobs(inputs["own_scores"], spec.k)
    values = {"eval/kl_to_base": 0.0}
    for name, role in (("base", "own_scores_base"), ("previous", "own_scores_previous")):
        if role in inputs:
            other = join.token_logprobs(inputs[role], spec.k)
            sums = [k3(own[i]["token_logprobs"], other[i]["token_logprobs"]) for i in own]
            values[f"eval/kl_to_{name}"] = math.fsum(sums) / len(sums)
    return values


def k3(policy: Sequence[float], other: Sequence[float]) -> float:
    """The k3 estimate of KL(policy || other) along one sampled answer: token log-probs in, nats out."""
    gap = np.asarray(other, dtype=np.float64) - np.asarray(policy, dtype=np.float64)
    return float(np.sum(np.expm1(gap) - gap))


def game(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> Values:
    """eval/margin: beta times Delta of iterate k on held-out pairs, with the reference and the sampler of iteration
    k - 1; eval/accuracy: the share of pairs with Delta > 0. Within an iteration both rise; over iterations an accuracy
    that falls toward one half says that answers can hardly be told from real ones: across iterations low is good.
    """
    assert spec.game is not None and spec.beta is not None
    real = join.scores(inputs[real_role(spec.k)], None)
    generated = {j: join.scores(inputs[generated_role(spec.k, j)], j) for j in spec.game.window}
    deltas = []
    for pair in join.pairs(spec.game, inputs, Split.heldout):
        name = pair.example["example_id"]
        policy = generated[pair.answer["sampled_from"]][name]
        ratios = [real[name] - pair.reference_real, policy - pair.reference_generated]
        if spec.length_norm is LengthNorm.mean:
            lengths = (len(pair.example["real_ids"]), len(pair.answer["generated_ids"]))
            ratios = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
        deltas.append(ratios[0] - ratios[1])
    array = np.array(deltas)
    return {"eval/margin": spec.beta * float(array.mean()), "eval/accuracy": float((array > 0).mean())}


def samples(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The first held-out prompts with their real answers and this iterate's."""
    answers = tables.ById(inputs["own"] / "answers.parquet")
    shown = tables.read(inputs["data"] / f"{Split.heldout}.parquet")[: spec.num_samples]
    rows = []
    for row in shown:
        answer = answers[row["example_id"]]
        kept = {"prompt": row["prompt"], "real": row["real"], "generated": answer["generated"]}
        rows.append({"iterate": spec.k, **kept, "finish_reason": answer["finish_reason"]})
    return rows
