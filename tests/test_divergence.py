"""KL over the whole vocabulary: against brute force, against enumeration of all answers, and through the command."""

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command
from test_sampling import END, llama, points
from transformers import PreTrainedModel

from spin_reg import amounts, diagnostics, estimate, logprobs, sampling
from spin_reg.logprobs import collate, token_divergences, token_logprobs
from spin_reg.settings import Tiny


def two(vocab: int = 12) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A small model, and the same moved a little."""
    policy, other = llama(vocab), llama(vocab)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return policy, other


@torch.no_grad()
def test_it_is_the_sum_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, other = (model.double() for model in two())  # in float32 a model rounds a row otherwise beside others
    prompts, answers = [[1, 2, 3], [4], [2, 2]], [[1, 2, 3, END], [7], [8, 9, 1]]
    found = token_divergences(policy, other, collate(prompts, answers))
    monkeypatch.setattr(logprobs, "POSITIONS", 2)
    assert torch.equal(token_divergences(policy, other, collate(prompts, answers)), found)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for j in range(len(answer)):
            ids = torch.tensor([prompt + answer[:j]])
            p, q = (model(input_ids=ids).logits[0, -1].double().log_softmax(0) for model in (policy, other))
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            assert found[row, j].item() == pytest.approx(kl, abs=1e-6) and kl > 1e-3
        assert found[row, len(answer) :].tolist() == [0.0] * (4 - len(answer))
    assert token_divergences(policy, policy, collate(prompts, answers)).abs().max() == 0.0


@torch.no_grad()
def test_its_mean_over_own_answers_is_the_kl_of_the_sequences() -> None:
    """Every answer of up to three tokens, weighted by its probability; so is the mean of k3."""
    policy, other = two(6)
    tokens = [t for t in range(6) if t != END]
    answers = [[END], *([a, END] for a in tokens), *([a, b, c] for a, b in product(tokens, tokens) for c in range(6))]
    batch = collate([[1, 2]] * len(answers), answers)
    p, q = (token_logprobs(model, batch).double() for model in (policy, other))
    weights = p.sum(1).exp()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    kl = (weights * (p - q).sum(1)).sum().item()
    full = token_divergences(policy, other, batch).sum(1)
    assert (weights * full).sum().item() == pytest.approx(kl, abs=1e-5) and kl > 0.01
    lengths = [len(answer) for answer in answers]
    k3 = torch.tensor([diagnostics.k3(a[:n], b[:n]) for a, b, n in zip(p.tolist(), q.tolist(), lengths, strict=True)])
    assert (weights * k3).sum().item() == pytest.approx(kl, abs=1e-5)

    def noise(values: torch.Tensor) -> float:
        return float((weights * (values.double() - kl) ** 2).sum())

    assert noise(full) < noise(k3)
    drawn = sampling.sample(policy, [[1, 2]] * 2000, points(2000, 3), ends=[END], temperature=1.0, top_p=1.0)
    place = {tuple(answer): i for i, answer in enumerate(answers)}
    sampled = diagnostics.mean("x", full[[place[tuple(answer.ids)] for answer in drawn]].numpy())
    assert abs(sampled["x"] - kl) < 4 * sampled["x_se"]


@pytest.mark.slow
def test_it_is_reported_beside_k3_on_a_finished_run(train: Callable[..., Path], command: Command) -> None:
    root = train("dataset.num_heldout=48")
    result = command("evaluate", str(root), "evaluation.full_kl=true", "evaluation.full_kl_prompts=40")
    assert result.code == 0, result.err
    made = sorted(p.name for p in root.glob("iterate-??/divergence/*"))
    assert made == ["from-00-first-40", "from-00-first-40", "from-01-first-40"]  # 1 from its base, 2 from both
    rows = pq.read_table(root / "iterate-02/divergence/from-01-first-40/divergences.parquet").to_pylist()
    heldout = pq.read_table(root / "data/heldout.parquet", columns=["example_id"]).column(0).to_pylist()
    assert [row["example_id"] for row in rows] == heldout[:40] and min(row["kl"] for row in rows) > 0
    for k in (1, 2):
        found = json.loads((root / f"iterate-{k:02d}/evaluate/metrics.json").read_text())
        for name in ("base", "previous"):
            full, k3 = f"eval/kl_to_{name}_full", f"eval/kl_to_{name}"
            error = math.hypot(found[f"{full}_se"], found[f"{k3}_se"])
            assert abs(found[full] - found[k3]) < 4 * error and found[full] > 0
    assert found["eval/kl_to_previous_full"] == pytest.approx(sum(row["kl"] for row in rows) / 40)
    assert "nothing to do" in command("evaluate", str(root)).err


def test_two_models_are_in_memory_at_once() -> None:
    from test_config import composed

    from spin_reg.plan import Sources, plan

    stages = plan(composed("evaluation.full_kl=true"), Sources(model=None, tokenizer="t", data=None))
    found = estimate.memory(stages, Tiny()).by_kind
    assert found["divergence"].total > found["score"].total
    (one, *_) = (stage for stage in stages if stage.kind == "divergence")
    limits = composed().dataset
    tokens = 2 * 64 * (limits.max_prompt_tokens + limits.max_response_tokens)
    rows = dict.fromkeys(("train", "heldout", "retained_train", "retained_heldout"), 100)
    assert estimate.work([one], amounts.limits(limits, rows)).scored == tokens  # type: ignore[arg-type]
