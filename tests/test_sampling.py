"""Draws: their law is the policy's, and depends on nothing but the example."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Command
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

from spin_reg import decoder, sampling, scorer
from spin_reg.logprobs import collate, token_logprobs
from spin_reg.stages import generate

END = 5


def llama(vocab: int = 12) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocab: int = 12) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


PROMPTS = [[1, 2], [3], [4, 6, 7, 8], [9, 1], [2, 2, 2, 2, 2], [7], [8, 9, 10]]


def points(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([sampling.uniforms(seed, 0, f"row {i}", "train", length) for i in range(rows)])


def draw(model: PreTrainedModel, prompts: list[list[int]], u: torch.Tensor) -> list[sampling.Answer]:
    return sampling.sample(model, prompts, u, ends=[END], temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_answers_are_those_of_one_row_at_a_time_without_a_cache(build) -> None:  # type: ignore[no-untyped-def]
    """The cached, padded, shrinking batch draws what a plain loop over full forwards draws from the same numbers."""
    model, u = build(), points(len(PROMPTS), 20)
    batch = draw(model, PROMPTS, u)
    assert {a.finish_reason for a in batch} == {"stop", "length"} or any(a.finish_reason == "stop" for a in batch)
    for prompt, row, answer in zip(PROMPTS, u, batch, strict=True):
        ids: list[int] = []
        for point in row:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            cumulative = torch.softmax(logits.double(), dim=-1).cumsum(0)
            ids.append(int((cumulative <= point * cumulative[-1]).sum()))
            if ids[-1] == END:
                break
        assert answer.ids == ids


def test_batch_size_and_order_change_no_answer() -> None:
    model, u = llama(), points(len(PROMPTS), 20)
    together = draw(model, PROMPTS, u)
    alone = [draw(model, [p], u[i : i + 1])[0] for i, p in enumerate(PROMPTS)]
    backwards = draw(model, PROMPTS[::-1], u.flip(0))[::-1]
    assert together == alone == backwards


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=12, num_hidden_layers=2, sliding_window=window, initializer_range=0.6, **shape)
    return MistralForCausalLM(config).eval()


def past_a_window() -> PreTrainedModel:
    """Looks back over all of every prompt here, and over less than prompts and answers."""
    return mistral(26)


def within_prompts() -> PreTrainedModel:
    """Looks back over less than the longest prompts, which are then not read packed."""
    return mistral(20)


@pytest.mark.parametrize("at_once", [decoder.PREFILL, 30])
@pytest.mark.parametrize("build", [llama, gpt2, past_a_window, within_prompts])
def test_rows_of_many_lengths_that_come_and_go_bring_their_own_log_probs(
    build: Callable[[], PreTrainedModel], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows read different columns, prompts come in behind what left, so many tokens at once; nothing of that
    may show.
    """
    monkeypatch.setattr(decoder, "PREFILL", at_once)
    prompts = [[1 + (7 * i + j) % 4 for j in range(1 + i * 5 % 23)] for i in range(70)]
    model, u = build(), points(70, 24)
    answers = sampling.sample(model, prompts, u, ends=[END], temperature=1.0, top_p=1.0, batch_size=40)
    with torch.no_grad():
        plain = token_logprobs(model, collate(prompts, [a.ids for a in answers]))
    for row, answer in zip(plain, answers, strict=True):
        assert answer.logprobs == pytest.approx(row[: len(answer.ids)].tolist(), abs=5e-5)


def test_what_prompts_begin_with_in_common_is_read_once() -> None:
    model, seen = llama(), []
    prompts = [[*range(1, 11), *prompt] for prompt in PROMPTS]
    alone = [draw(model, [prompt], u)[0] for prompt, u in zip(prompts, points(len(PROMPTS), 8).split(1), strict=True)]
    hook = model.model.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert draw(model, prompts, points(len(PROMPTS), 8)) == alone
    hook.remove()
    assert seen[0] == (1, 10 + sum(map(len, PROMPTS)))  # the last token of each stands beside the others
    going = sum(len(answer.ids) > 1 for answer in alone)
    assert seen[1] == (1, going if going < sampling.LEAVE * len(PROMPTS) else len(PROMPTS))


@pytest.mark.parametrize("autocast", [False, True])
def test_prompts_of_one_token(autocast: bool) -> None:
    model, u = llama(), points(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        answers = sampling.sample(model, [[i] for i in range(5)], u, ends=[END], temperature=1.0, top_p=1.0)
        plain = token_logprobs(model, collate([[i] for i in range(5)], [a.ids for a in answers]))
    for row, answer in zip(plain, answers, strict=True):
        near = pytest.approx(row[: len(answer.ids)].tolist(), abs=0.1 if autocast else 5e-5)
        assert answer.logprobs == near
    assert sampling.sample(model, [], points(5, 8)[:0], ends=[END], temperature=1.0, top_p=1.0) == []


@pytest.mark.parametrize("build", [llama, gpt2])
def test_what_slots_see_does_not_hang_on_the_models_own_forward(build: Callable[[], PreTrainedModel]) -> None:
    """GPT-2's did not hand it on in transformers 5.0: rows would see one another."""
    model, u = build(), points(len(PROMPTS), 8)
    wanted = draw(model, PROMPTS, u)
    model.forward = lambda *args, **kwargs: pytest.fail("it was called")
    assert draw(model, PROMPTS, u) == wanted


def test_a_cache_of_another_kind_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some architectures keep more than keys and values there."""

    class Other(DynamicLayer):
        pass

    model, u, made = llama(), points(len(PROMPTS), 8), []
    wanted = draw(model, PROMPTS, u)

    def caches(*args: Any, **kwargs: Any) -> DynamicCache:
        made.append(DynamicCache(*args, **kwargs))
        made[-1].layers = [Other() for _ in range(2)]
        return made[-1]

    monkeypatch.setattr(decoder, "DynamicCache", caches)
    assert draw(model, PROMPTS, u) == wanted
    assert sum(bool(cache.layers[0].is_initialized) for cache in made) == len(PROMPTS)


def test_an_end_token_stands_last_or_nowhere() -> None:
    answers = draw(llama(), PROMPTS * 10, points(len(PROMPTS) * 10, 6))
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    for a in answers:
        assert (a.ids[-1] == END) == (a.finish_reason == "stop")
        assert a.ids.count(END) == (a.finish_reason == "stop")
        assert len(a.ids) == 6 or a.finish_reason == "stop"


def test_a_cut_off_answer_gets_no_end() -> None:
    answers = sampling.sample(llama(), PROMPTS, points(len(PROMPTS), 4), ends=[999], temperature=1.0, top_p=1.0)
    assert all(a.finish_reason == "length" and len(a.ids) == 4 for a in answers)


def test_pick_follows_the_distribution() -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    n = 40_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn, _ = sampling.pick(logits.expand(n, -1), grid, temperature=1.0, top_p=1.0)
    share = torch.bincount(drawn, minlength=9).double() / n
    assert torch.allclose(share, torch.softmax(logits[0].double(), 0), atol=1e-4)


def test_pick_at_a_temperature_and_a_nucleus() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def share(**kwargs: float) -> list[float]:
        drawn, _ = sampling.pick(p.log().expand(1000, -1), grid, **kwargs)
        return (torch.bincount(drawn, minlength=4) / 1000).tolist()

    assert share(temperature=1.0, top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)
    assert share(temperature=1.0, top_p=0.81) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=2e-3)
    squared = [v * v for v in p[0].tolist()]
    assert share(temperature=0.5, top_p=1.0) == pytest.approx([v / sum(squared) for v in squared], abs=2e-3)


def test_at_temperature_0_the_likeliest_token_is_taken() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [-1.0, -2.0, -9.0], [0.0, math.nan, 1.0], [-math.inf] * 3])
    drawn, logprob = sampling.pick(logits, torch.rand(4).double(), temperature=0, top_p=1.0)
    assert drawn.tolist() == [1, 0, -1, -1] and logprob.tolist() == [0.0] * 4  # the first of equals, surely
    model = llama()
    greedy = [
        sampling.sample(model, PROMPTS, points(len(PROMPTS), 6, seed), ends=[END], temperature=0, top_p=1.0)
        for seed in (0, 1)
    ]
    assert greedy[0] == greedy[1]
    for prompt, answer in zip(PROMPTS, greedy[0], strict=True):
        for j, token in enumerate(answer.ids):
            with torch.no_grad():
                assert token == int(model(input_ids=torch.tensor([prompt + answer.ids[:j]])).logits[0, -1].argmax())


def test_pick_looks_at_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, at = torch.randn(7, 700), torch.rand(7).double()
    whole = sampling.pick(logits, at, temperature=0.7, top_p=0.9)
    monkeypatch.setattr(scorer, "IN_CACHE", 1500)  # two rows
    for one, other in zip(sampling.pick(logits, at, temperature=0.7, top_p=0.9), whole, strict=True):
        assert torch.equal(one, other) and len(one) == 7


def test_pick_never_leaves_the_vocabulary() -> None:
    top = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert int(sampling.pick(torch.zeros(1, 7), top, temperature=1.0, top_p=1.0)[0]) == 6
    assert (
        int(sampling.pick(torch.zeros(1, 7), torch.zeros(1, dtype=torch.float64), temperature=1.0, top_p=1.0)[0]) == 0
    )
    certain = torch.full((1, 7), -1e9)
    certain[0, 3] = 0
    assert int(sampling.pick(certain, top, temperature=1.0, top_p=1.0)[0]) == 3


def test_the_law_of_whole_answers_is_the_policy() -> None:
    """Mean of the sampled log-prob equals minus the entropy, computed by enumeration over two tokens."""
    model = llama(6)
    n = 4000
    answers = sampling.sample(model, [[1, 2]] * n, points(n, 2), ends=[END], temperature=1.0, top_p=1.0)
    every = [[END], *([a, b] for a in range(6) if a != END for b in range(6))]
    with torch.no_grad():
        table = token_logprobs(model, collate([[1, 2]] * len(every), every)).double().sum(1)
    counts = torch.tensor([sum(a.ids == ids for a in answers) for ids in every], dtype=torch.double)
    expected = n * table.exp()
    assert math.isclose(float(expected.sum()), n, rel_tol=1e-6)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < len(every) + 5 * math.sqrt(2 * len(every))


def test_draws_are_keyed_by_every_part() -> None:
    base = sampling.uniforms(0, 1, "a", "train", 5)
    assert torch.equal(base, sampling.uniforms(0, 1, "a", "train", 9)[:5])
    for other in ((1, 1, "a", "train"), (0, 2, "a", "train"), (0, 1, "b", "train"), (0, 1, "a", "heldout")):
        assert not torch.equal(base, sampling.uniforms(*other, 5))


def test_only_short_answers_are_scored_anew(
    command: Command, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler whose log-probs are off goes unseen where all answers are short, and stops the run where none is."""
    drawn = sampling.sample

    def off(*args: Any, **kwargs: Any) -> list[sampling.Answer]:
        return [replace(answer, logprobs=[x + 1 for x in answer.logprobs]) for answer in drawn(*args, **kwargs)]

    monkeypatch.setattr(sampling, "sample", off)
    words = ["regularizer=none", "schedule.iterations=1"]
    root = train(*words)
    monkeypatch.setattr(generate, "SHORT", 0)
    result = command("train", *SMALL, f"outputs={root.parent}2", "run_name=run", *words)
    assert result.code == 1 and "does not give the stored log-probs" in result.err
