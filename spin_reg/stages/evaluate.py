"""What is reported of an iterate: pure arithmetic over held-out tables that other stages made."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spin_reg import data, diagnostics, durable, exact, join, models, tables
from spin_reg.context import Context
from spin_reg.corpora import Toy
from spin_reg.diagnostics import Array, Values
from spin_reg.exact import ExactMatch
from spin_reg.roles import generated_role, real_role, results_role
from spin_reg.settings import LengthNorm
from spin_reg.specs import EvaluateSpec, PairsSpec, Split


def run(spec: EvaluateSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write metrics.json, the same as a row of metrics.jsonl, crossplay.json, preferences.json and samples.json."""
    values = likelihood(inputs, spec.k) | known_language(spec, inputs) | step_direction(inputs, spec.k)
    values |= answers_look(inputs, spec.k) | divergences(spec, inputs) | exact_match(spec, inputs)
    if spec.game is not None and spec.beta is not None:
        values |= game(spec, inputs)
    durable.write_json(out / "metrics.json", values)
    row = {"iterate": spec.k, **position(inputs["model"]), **values}
    durable.write_jsonl(out / "metrics.jsonl", [row])
    durable.write_json(out / "crossplay.json", crossplay(spec, inputs))
    durable.write_json(out / "preferences.json", preferences(inputs, spec.k))
    durable.write_json(out / "samples.json", samples(spec, inputs))


def position(model: Path) -> dict[str, int]:
    """Where on the (iteration, step) axis this iterate stands: the last step that made it; (0, 0) for the base."""
    path = model / "metrics.jsonl"
    last = durable.read_jsonl(path)[-1:] if path.exists() else []
    played = last and last[0]["iteration"] >= 0
    return {key: last[0][key] if played else 0 for key in ("iteration", "step")}


def _heldout(inputs: Mapping[str, Path]) -> Path:
    return inputs["data"] / f"{Split.heldout}.parquet"


def _real(inputs: Mapping[str, Path], k: int) -> Array:
    """log pi_k of the real held-out answers in the order of the prompts: nats a sequence."""
    scored = join.scores(inputs[real_role(k)], None)
    return np.array([scored[name] for name in tables.column("example_id", _heldout(inputs))])


def likelihood(inputs: Mapping[str, Path], k: int) -> Values:
    """Held-out likelihood of the real answers.

    eval/heldout_nll: nats a token; lower is better. eval/heldout_real_logprob: nats a sequence, minus the NLL of a
    sequence; higher is better. eval/heldout_nll_change: NLL a sequence less the base's, over the same answers; below 0
    is better, 0 of the base itself. It is unbiased for KL(p_data || pi_k) - KL(p_data || pi_0), whatever p_data is.
    eval/preferred_to_base and eval/preferred_to_previous: see `diagnostics.preferred`; one half of the base itself.
    """
    logprobs, tokens = _real(inputs, k), tables.lengths("real_ids", _heldout(inputs))
    change = _real(inputs, 0) - logprobs
    values = diagnostics.ratio("eval/heldout_nll", -logprobs, tokens)
    values |= diagnostics.mean("eval/heldout_real_logprob", logprobs)
    if k == 0:
        return values | {"eval/heldout_nll_change": 0.0, "eval/preferred_to_base": 0.5}
    values |= diagnostics.mean("eval/heldout_nll_change", change)
    for name, j in (("base", 0), ("previous", k - 1)):
        values |= diagnostics.preferred(f"eval/preferred_to_{name}", logprobs, _real(inputs, j))
    return values


def preferences(inputs: Mapping[str, Path], k: int) -> list[dict[str, Any]]:
    """How often iterate k gives real held-out answers the higher log-prob than each before it."""
    ours = _real(inputs, k)
    return [{"iterate": k, "over": j, **diagnostics.preferred("share", ours, _real(inputs, j))} for j in range(k)]


def known_language(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> Values:
    """Distances from p_data, where it is known: nats a sequence, unbiased; all should fall, or at least not rise.

    eval/kl_data: KL(p_data || pi_k), the mean of log p_data - log pi_k over draws from p_data. eval/kl_data_reverse:
    KL(pi_k || p_data), the mean of log pi_k - log p_data over the iterate's own answers at temperature 1 (of one that
    was cut off, over what there is: no more than the whole). eval/kl_off: the first on the retained skill, which
    self-play does not see: forgetting.
    """
    if not isinstance(spec.dataset, Toy):
        return {}
    values: Values = {}
    for name, split, role in (
        ("eval/kl_data", Split.heldout, real_role(spec.k)),
        ("eval/kl_off", Split.retained_heldout, "retained"),
    ):
        known = tables.numbers_by_id("data_logprob", inputs["data"] / f"{split}.parquet")
        scored = join.scores(inputs[role], None)
        values |= diagnostics.mean(name, [known[example_id] - scored[example_id] for example_id in known])
    language = data.toy_language(spec.dataset, models.load_tokenizer(spec.model))
    answers, own = tables.ById(inputs["own"] / "answers.parquet"), join.scores(inputs["own_scores"], spec.k)
    asked = tables.read(_heldout(inputs), columns=["example_id", "prompt"])
    gaps = [
        own[row["example_id"]] - language.logprob(row["prompt"], answers[row["example_id"]]["generated_ids"])
        for row in asked
    ]
    return values | diagnostics.mean("eval/kl_data_reverse", gaps)


def step_direction(inputs: Mapping[str, Path], k: int) -> Values:
    """eval/step_direction: the correlation over held-out real answers of u_k - u_{k-1} and u_{k-1} - u_{k-2}, u_k = log
    pi_k in nats a sequence. -1 to 1, from iterate 2 on: below 0 the policy swings back and forth, about 0 it wanders,
    above 0 it walks one way.
    """
    if k < 2:
        return {}
    before, last = (b - a for a, b in pairwise(_real(inputs, j) for j in (k - 2, k - 1, k)))
    return diagnostics.correlation("eval/step_direction", last, before)


def answers_look(inputs: Mapping[str, Path], k: int) -> Values:
    """The iterate's own answers to the held-out prompts, at temperature 1.

    eval/length_mean and eval/length_p90: tokens an answer, its mean and 90th percentile; near those of the real ones.
    eval/length_auc: see `diagnostics.auc`. eval/stop_rate: answers that ended; eval/cutoff_share: that did not, at the
    limit. eval/distinct_1, eval/distinct_2 and eval/self_bleu: see `diagnostics.distinct` and `diagnostics.self_bleu`.
    eval/token_entropy: minus the mean of the sampled tokens' own log-probs, nats a token: a Monte Carlo (cross-)
    estimate, not the entropy of each distribution; its sum a sequence is unbiased for the entropy of the sampled paths.
    None of these should collapse.
    """
    path, scored = inputs["own"] / "answers.parquet", join.scores(inputs["own_scores"], k)
    lengths = np.array(tables.lengths("generated_ids", path))
    stopped = np.array([reason == "stop" for reason in tables.column("finish_reason", path)])
    real = dict(
        zip(tables.column("example_id", _heldout(inputs)), tables.lengths("real_ids", _heldout(inputs)), strict=True)
    )
    names = tables.column("example_id", path)
    answers = tables.column("generated_ids", path)
    return (
        diagnostics.mean("eval/length_mean", lengths)
        | {"eval/length_p90": float(np.quantile(lengths, 0.9))}
        | diagnostics.auc("eval/length_auc", lengths, [real[name] for name in names])
        | diagnostics.mean("eval/stop_rate", stopped)
        | diagnostics.mean("eval/cutoff_share", ~stopped)
        | {f"eval/distinct_{n}": diagnostics.distinct(answers, n) for n in (1, 2)}
        | diagnostics.self_bleu(answers)
        | diagnostics.ratio("eval/token_entropy", [-scored[name] for name in names], lengths)
    )


def divergences(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> Values:
    """eval/kl_to_base and eval/kl_to_previous: KL(pi_k || pi_q) in nats a sequence, along answers of pi_k itself at
    temperature 1: the mean of `diagnostics.k3`. 0 for the base against itself; small steps keep both small.
    eval/kl_to_base_full and eval/kl_to_previous_full: the same over the whole vocabulary (see `stages.divergence`), on
    the first held-out prompts: less noise, and never below 0 but by rounding.
    """
    own = join.token_logprobs(inputs["own_scores"], spec.k)
    values = {"eval/kl_to_base": 0.0}
    for name, role in (("base", "own_scores_base"), ("previous", "own_scores_previous")):
        if role in inputs:
            other = join.token_logprobs(inputs[role], spec.k)
            sums = [diagnostics.k3(own[i]["token_logprobs"], other[i]["token_logprobs"]) for i in own]
            values |= diagnostics.mean(f"eval/kl_to_{name}", sums)
        if f"full_kl_{name}" in inputs:
            sums = tables.column("kl", inputs[f"full_kl_{name}"] / "divergences.parquet")
            values |= diagnostics.mean(f"eval/kl_to_{name}_full", sums)
    return values


def exact_match(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> Values:
    """Held-out answers whose result is the real one's, where the settings say what a result is (see `exact.result`).

    eval/exact_match: the share of right answers, over all prompts whose real answer has a result; one without a result
    is wrong. eval/exact_match_answered: the share with any result. eval/exact_match_change: the share less the base's
    over the same prompts, its error that of paired differences; 0 of the base itself. All are better when higher.

    Raises:
        DataError: few of the real answers have a result.
    """
    if spec.exact_match is None:
        return {}
    found, wanted = _results(spec.exact_match, inputs, spec.k), _wanted(spec.exact_match, inputs)
    right = np.array([found[name] == wanted[name] for name in wanted], dtype=np.float64)
    values = diagnostics.mean("eval/exact_match", right)
    values |= diagnostics.mean("eval/exact_match_answered", [found[name] is not None for name in wanted])
    if spec.k == 0:
        return values | {"eval/exact_match_change": 0.0}
    base = _results(spec.exact_match, inputs, 0)
    return values | diagnostics.mean("eval/exact_match_change", right - [base[name] == wanted[name] for name in wanted])


def _results(settings: ExactMatch, inputs: Mapping[str, Path], k: int) -> dict[str, str | None]:
    """What iterate k's answers come to, by example_id."""
    answers = tables.read(inputs[results_role(k)] / "answers.parquet", columns=["example_id", "generated"])
    return {row["example_id"]: exact.result(settings, row["generated"]) for row in answers}


def _wanted(settings: ExactMatch, inputs: Mapping[str, Path]) -> dict[str, str]:
    asked = tables.read(_heldout(inputs), columns=["example_id", "real"])
    return exact.wanted(settings, {row["example_id"]: row["real"] for row in asked})


def played(k: int, spec: PairsSpec, length_norm: LengthNorm, inputs: Mapping[str, Path]) -> tuple[Array, Array, Array]:
    """Delta of iterate k on the held-out pairs of a game, and log pi_k of the real and of the generated answers."""
    real = join.scores(inputs[real_role(k)], None)
    generated = {j: join.scores(inputs[generated_role(k, j)], j) for j in spec.window}
    rows = []
    for pair in join.pairs(spec, inputs, Split.heldout):
        name = pair.example["example_id"]
        policy = (real[name], generated[pair.answer["sampled_from"]][name])
        ratios = [policy[0] - pair.reference_real, policy[1] - pair.reference_generated]
        if length_norm is LengthNorm.mean:
            lengths = (len(pair.example["real_ids"]), len(pair.answer["generated_ids"]))
            ratios = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
        rows.append((ratios[0] - ratios[1], *policy))
    deltas, of_real, of_generated = np.array(rows).T
    return deltas, of_real, of_generated


def game(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> Values:
    """Iterate k on held-out pairs, with the reference and the sampler of iteration k - 1.

    eval/margin: beta times Delta. eval/accuracy: the share of pairs with Delta > 0, ties (where the opponent gave the
    real answer) half, so that one half is chance. Within an iteration both rise; over iterations an accuracy that
    falls toward one half says that answers can hardly be told from real ones: across iterations low is good. eval/gap
    and eval/misalignment: see `diagnostics.gaps` and `diagnostics.misaligned`. eval/heldout_generated_logprob: log pi_k
    of the opponent's answers, nats a sequence, beside heldout_real_logprob: a margin that grows while both fall is
    bought with likelihood.
    """
    assert spec.game is not None and spec.beta is not None
    deltas, real, generated = played(spec.k, spec.game, spec.length_norm, inputs)
    z = spec.beta * deltas
    return (
        diagnostics.mean("eval/margin", z)
        | diagnostics.mean("eval/accuracy", np.heaviside(deltas, 0.5))
        | diagnostics.mean("eval/gap", diagnostics.gaps(z))
        | diagnostics.mean("eval/misalignment", diagnostics.misaligned(deltas, real, generated))
        | diagnostics.mean("eval/heldout_generated_logprob", generated)
    )


def crossplay(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A[i, j]: the held-out accuracy of f_i = beta (log pi_i - log r_{i-1}), the discriminator that iteration i - 1
    trained, on data against answers of pi_j. Here the entries that iterate k adds: its row, and where
    `evaluation.crossplay` is on its column. Below the diagonal (j >= i) near one half is healthy; an old f_i that wins
    again later says that the policy forgets, or goes round.
    """
    entries = []
    for match in spec.matches:
        (j,) = match.window
        deltas, _, _ = played(match.t + 1, match, spec.length_norm, inputs)
        entries.append(
            {"discriminator": match.t + 1, "answers": j, **diagnostics.mean("accuracy", np.heaviside(deltas, 0.5))}
        )
    return entries


def samples(spec: EvaluateSpec, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The first held-out prompts with their real answers and this iterate's; with exact match also the answer that was
    matched, and both results.
    """
    answers = tables.ById(inputs["own"] / "answers.parquet")
    shown = tables.read(inputs["data"] / f"{Split.heldout}.parquet")[: spec.num_samples]
    rows = []
    for row in shown:
        answer = answers[row["example_id"]]
        kept = {"prompt": row["prompt"], "real": row["real"], "generated": answer["generated"]}
        rows.append({"iterate": spec.k, **kept, "finish_reason": answer["finish_reason"]})
        if spec.exact_match is not None:
            matched = tables.ById(inputs[results_role(spec.k)] / "answers.parquet")[row["example_id"]]["generated"]
            results = [exact.result(spec.exact_match, row["real"], real=True), exact.result(spec.exact_match, matched)]
            rows[-1] |= {"matched": matched} | dict(zip(("real_result", "result"), results, strict=True))
    return rows
