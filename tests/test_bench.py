"""The pure parts of scripts/bench: FLOPs against PyTorch's own counter, what a log says, the table. No times."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "scripts" / "bench"))

import arithmetic
import report

LOG = """\
2026-01-01 00:00:00 INFO runner: data: todo (not made yet)
2026-01-01 00:00:01 INFO runner: data: took {"seconds": 1.5, "peak_memory": 100}
2026-01-01 00:00:02 INFO runner: iterate-00/base: took {"seconds": 0.5, "peak_memory": 90}
2026-01-01 00:00:03 INFO runner: iterate-00/answers/train-00: took {"seconds": 2.0, "peak_memory": 300}
2026-01-01 00:00:04 INFO runner: iterate-00/scores/train-real: took {"seconds": 3.0, "peak_memory": 200}
2026-01-01 00:00:05 INFO runner: iterate-00/scores/train-00-from-00: took {"seconds": 4.0, "peak_memory": 250}
2026-01-01 00:00:06 INFO runner: iteration-00/pairs: took {"seconds": 0.1, "peak_memory": 80}
2026-01-01 00:00:07 INFO runner: iteration-00/train: took {"seconds": 6.0, "peak_memory": 400}
"""


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_forward_are_those_that_torch_counts(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    found, tokens = arithmetic.shape(tmp_path), 7
    assert (found.layers, found.width, found.head) == (3, 32, 40 * 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False)
    unseen = 4 * 32 * 3 * (tokens * tokens - tokens * (tokens + 1) // 2)  # eager attention multiplies what is masked
    by_module = counter.get_flop_counts()
    angles = sum(by_module.get("LlamaForCausalLM.model.rotary_emb", {}).values())  # a product in some of its releases
    assert arithmetic.forward(found, tokens, tokens) == counter.get_total_flops() - unseen - angles


def test_work_counts_a_pairs_prompt_once_and_no_forward_of_a_last_token() -> None:
    model = arithmetic.Shape(layers=1, width=1, body=10, head=100)
    assert arithmetic.answer(model, 3, 2) == 2 * 10 * 4 + 2 * 100 * 2 + 4 * (1 + 2 + 3 + 4)
    pairs = arithmetic.Lengths(prompt=[3, 1], real=[2, 4], generated=[5, 6])
    flops, tokens = arithmetic.pairs_work(model, pairs)
    alone = sum(arithmetic.answer(model, p, n) for p, n in [(3, 2), (3, 5), (1, 4), (1, 6)])
    assert flops == alone - (2 * 10 * 3 + 4 * (1 + 2 + 3)) - (2 * 10 + 4)
    assert tokens == 2 * (3 + 1) + 2 + 4 + 5 + 6
    single = arithmetic.Lengths(prompt=[3], real=[2], generated=[2], shared=3)
    assert arithmetic.sampling_work(model, single, [2]) == (arithmetic.answer(model, 3, 2), 2)


def test_work_counts_what_all_prompts_begin_with_once() -> None:
    """And no more than that: what is read is at least this, so utilisation is not made to look better than it is."""
    model, prompts = arithmetic.Shape(layers=1, width=0, body=10, head=100), [[7, 7, 1], [7, 7, 2, 2], [7, 7]]
    assert (
        arithmetic.shared(prompts) == 2 and arithmetic.shared(prompts[:1]) == 3 and arithmetic.shared([[1], [2]]) == 0
    )
    pairs = arithmetic.Lengths([3, 4, 2], real=[2, 4, 1], generated=[5, 6, 1], shared=2)
    flops, _ = arithmetic.pairs_work(model, pairs)
    slots = 2 + 1 + 2 + sum(n - 1 for n in (2, 4, 1, 5, 6, 1))
    assert flops == 2 * 10 * slots + 2 * 100 * (2 + 4 + 1 + 5 + 6 + 1)


def test_a_log_gives_the_parts_of_an_iteration() -> None:
    parts = arithmetic.by_part(arithmetic.took(LOG))
    assert parts == {
        arithmetic.REST: {"seconds": pytest.approx(2.1), "peak": 100},
        "sampling": {"seconds": 2.0, "peak": 300},
        "scoring": {"seconds": 7.0, "peak": 250},
        "training": {"seconds": 6.0, "peak": 400},
    }
    rows = arithmetic.completed(parts, wall=20.0, peak=350)
    assert rows[arithmetic.WHOLE] == {"seconds": 20.0, "peak": 400}  # the system's own has forgotten some
    assert rows[arithmetic.REST] == {"seconds": 5.0}


def test_the_ratio_is_the_median_of_those_within_a_repeat() -> None:
    seconds = [(1.0, 2.0), (10.0, 20.0), (4.0, 2.0)]
    repeats = [{"ours": {"scoring": {"seconds": a}}, "peer": {"scoring": {"seconds": b}}} for a, b in seconds]
    assert report.ratios(repeats, "scoring") == [2.0, 2.0, 0.5]
    text = report.table(repeats)
    assert "| scoring | 4 (1-10) | 2 (2-20) | 2.00 (0.50-2.00) |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_a_ratio_is_of_seconds_a_token_where_both_count_tokens() -> None:
    sides = {
        "ours": {"sampling": {"seconds": 1.0, "tokens": 10}},
        "peer": {"sampling": {"seconds": 1.0, "tokens": 5}},
    }
    assert report.ratios([sides], "sampling") == [2.0]


def test_numbers_are_shown_short() -> None:
    assert report.spread([]) == "" and report.spread([2.0]) == "2"
    assert report.percent(0.254) == "25 %" and report.percent(0.0123) == "1.2 %"
    assert arithmetic.utilisation(5e9, 2.0, 1e10) == 0.25
