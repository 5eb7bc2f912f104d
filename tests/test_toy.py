"""The embedded language: its probabilities are exact, its support is full, its draws follow them."""

import math
from collections import Counter

import numpy as np
import pytest

from spin_reg import data, models, toy
from spin_reg.corpora import Toy
from spin_reg.specs import Split

TOKENIZER = models.byte_tokenizer()
SETTINGS = Toy(num_prompts=200, num_heldout=100, smoothing=0.01)
LANGUAGE = data.toy_language(SETTINGS, TOKENIZER)


@pytest.mark.parametrize("answer", [[], [64], [64, 65, 66, 67, 68], [3, 258], [64] * 40])
def test_next_probabilities_sum_to_one_with_full_support(answer: list[int]) -> None:
    p = LANGUAGE.next_probabilities("A1", answer)
    assert p.shape == (len(TOKENIZER),)
    assert math.isclose(p.sum(), 1.0, abs_tol=1e-12)
    assert p.min() >= 0.01 / len(TOKENIZER) * (1 - 1e-12)


def test_a_small_language_sums_to_one_over_all_its_answers() -> None:
    """Enumerate every answer of a two-token tail: finished ones and unfinished prefixes share all the mass."""
    total = 0.0
    vocabulary = range(len(TOKENIZER))
    for first in vocabulary:
        if first == LANGUAGE.end:
            total += math.exp(LANGUAGE.logprob("B2", [first]))
        else:
            p = LANGUAGE.next_probabilities("B2", [first])
            total += math.exp(LANGUAGE.logprob("B2", [first])) * p.sum()
    assert math.isclose(total, 1.0, abs_tol=1e-9)


def test_draws_follow_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    n = 3000
    first = Counter(LANGUAGE.draw("C3", rng)[0] for _ in range(n))
    p = LANGUAGE.next_probabilities("C3", [])
    chi2 = sum((first[v] - n * p[v]) ** 2 / (n * p[v]) for v in range(len(p)))
    assert chi2 < len(p) + 5 * math.sqrt(2 * len(p))


def test_an_answer_ends_once_and_is_short() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        answer = LANGUAGE.draw("D4", rng)
        assert answer.count(LANGUAGE.end) == 1 and answer[-1] == LANGUAGE.end
    strict = data.toy_language(Toy(num_prompts=1, smoothing=1e-6), TOKENIZER)
    lengths = [len(strict.draw("D4", rng)) for _ in range(200)]
    assert min(lengths) > toy.SHORTEST and max(lengths) <= toy.LONGEST + 1


def test_the_language_hangs_on_dataset_seed_and_nothing_else() -> None:
    one, _ = data.prepare(SETTINGS, TOKENIZER, (LANGUAGE.end,))
    two, _ = data.prepare(SETTINGS, TOKENIZER, (LANGUAGE.end,))
    other, _ = data.prepare(Toy(num_prompts=200, num_heldout=100, smoothing=0.01, seed=1), TOKENIZER, (LANGUAGE.end,))
    assert one == two != other


def test_the_retained_skill_is_outside_the_game() -> None:
    splits, _ = data.prepare(SETTINGS, TOKENIZER, (LANGUAGE.end,))
    assert {row["prompt"][0] for row in splits[Split.train] + splits[Split.heldout]} <= set(toy.GAME_TOPICS)
    assert {row["prompt"][0] for row in splits[Split.retained_heldout]} <= set(toy.RETAINED_TOPICS)
    assert not set(toy.GAME_TOPICS) & set(toy.RETAINED_TOPICS)
    for row in splits[Split.heldout][:20]:
        assert row["data_logprob"] == LANGUAGE.logprob(row["prompt"], row["real_ids"])
