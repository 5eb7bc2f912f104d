"""Log-probs of answers against a brute-force reading of tiny random models."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from spin_reg.logprobs import Batch, collate, sequence_logprobs, token_logprobs

VOCABULARY, END = 7, 6

# Prompts and responses of many lengths; token 0, with which rows are padded, is a token like any other.
PROMPTS = [[3], [1, 2, 0, 5], [0, 0, 4], [2, 5], [5, 1, 1, 3, 2, 4]]
RESPONSES = [[4, 0, 2, END], [END], [1, 3, 5, 0, 0, 2, END], [0, END], [2, 2, 0]]


class Full(nn.Module):
    """A causal model whose forward knows no `logits_to_keep`: logits for all columns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        return self.inner(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )


class Wrapped(nn.Module):
    """As accelerate and DDP wrap: the inner model under `module`, a forward that passes everything on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@functools.cache
def model(name: str) -> nn.Module:
    """A random model with large weights, so that its next-token distributions are far from each other."""
    torch.manual_seed(0)
    if name == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.7, **shape)
        return LlamaForCausalLM(config).eval()
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ends = {"bos_token_id": END, "eos_token_id": END}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.25, **sizes, **ends)).eval()


every_model = pytest.mark.parametrize("name", ["llama", "gpt2"])


@torch.no_grad()
def brute_force(name: str, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """log softmax of the last logits of every prefix, alone, without padding, mask, positions or `logits_to_keep`."""
    logprobs = []
    for j, token in enumerate(response):
        logits = model(name)(input_ids=torch.tensor([[*prompt, *response[:j]]])).logits[0, -1].double()
        logprobs.append(math.log(math.exp(logits[token]) / sum(math.exp(x) for x in logits.tolist())))
    return logprobs


@torch.no_grad()
def score(name: str, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    return sequence_logprobs(model(name), collate(prompts, responses))


@every_model
def test_probabilities_of_all_answers_sum_to_one(name: str) -> None:
    """All strings that end within 3 tokens, and all of 3 tokens that have not ended: nothing else can happen."""
    open_tokens = [v for v in range(VOCABULARY) if v != END]
    ended = [[*start, END] for n in range(3) for start in itertools.product(open_tokens, repeat=n)]
    unfinished = [list(start) for start in itertools.product(open_tokens, repeat=3)]
    answers = ended + unfinished
    assert len(answers) == 1 + 6 + 36 + 216
    for prompt in ([3], [0, 2, 5, 1]):
        probabilities = score(name, [prompt] * len(answers), answers).exp()
        assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert probabilities.max() < 0.9  # not all on one answer: that sum would prove little


@every_model
def test_every_token_matches_brute_force(name: str) -> None:
    """Catches logits read a column off, padding that is attended to, positions that count padding, and means."""
    with torch.no_grad():
        tokens = token_logprobs(model(name), collate(PROMPTS, RESPONSES))
    assert tokens.shape == (5, 7)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = brute_force(name, prompt, response)
        assert tokens[i, : len(response)].tolist() == pytest.approx(expected, abs=2e-5)
        assert tokens[i, len(response) :].eq(0).all()


@every_model
def test_a_sequence_is_the_sum_of_its_tokens(name: str) -> None:
    """log pi(y|x) = sum_j log pi(y_j|x, y_<j), the end token included, in float64."""
    scores = score(name, PROMPTS, RESPONSES)
    assert scores.dtype == torch.float64
    expected = [sum(brute_force(name, x, y)) for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=5e-5)


@every_model
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    """Alone, padded on both sides by longer companions, and in another order."""
    together = score(name, PROMPTS, RESPONSES)
    alone = torch.cat([score(name, [x], [y]) for x, y in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    order = [3, 0, 4, 2, 1]
    shuffled = score(name, [PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)
    longer = score(name, [*PROMPTS, [1] * 15], [*RESPONSES, [2] * 14])
    torch.testing.assert_close(longer[:-1], together, rtol=0, atol=1e-5)


@every_model
def test_what_lies_under_the_padding_does_not_matter(name: str) -> None:
    """Padding is known by its mask, not by its token."""
    batch = collate(PROMPTS, RESPONSES)
    other = Batch(
        batch.input_ids.masked_fill(batch.attention_mask == 0, 5),
        batch.attention_mask,
        batch.position_ids,
        batch.response_ids.masked_fill(~batch.response_mask, 5),
        batch.response_mask,
    )
    assert not torch.equal(other.input_ids, batch.input_ids)
    with torch.no_grad():
        torch.testing.assert_close(
            sequence_logprobs(model(name), other), sequence_logprobs(model(name), batch), rtol=0, atol=1e-5
        )


@every_model
@pytest.mark.parametrize("wrap", [Full, Wrapped])
def test_models_with_and_without_logits_to_keep_agree(name: str, wrap: type[nn.Module]) -> None:
    with torch.no_grad():
        wrapped = token_logprobs(wrap(model(name)), collate(PROMPTS, RESPONSES))
        bare = token_logprobs(model(name), collate(PROMPTS, RESPONSES))
    torch.testing.assert_close(wrapped, bare, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda inner: inner, Wrapped], ids=["bare", "wrapped"])
def test_only_the_logits_that_are_read_are_made(wrap: Any) -> None:
    """Of 6 + 7 columns the 7 of the responses and the one before: logits fill memory before anything else does."""
    shapes = []
    handle = model("llama").register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    try:
        with torch.no_grad():
            token_logprobs(wrap(model("llama")), collate(PROMPTS, RESPONSES))
    finally:
        handle.remove()
    assert shapes == [(5, 8, VOCABULARY)]


def test_rows_are_laid_out_around_one_column() -> None:
    """Prompts end and responses begin in the same column; positions count real tokens from 0."""
    batch = collate([[3], [1, 2, 5]], [[4, 6], [6]])
    assert batch.input_ids.tolist() == [[0, 0, 3, 4, 6], [1, 2, 5, 6, 0]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.response_ids.tolist() == [[4, 6], [6, 0]]
    assert batch.response_mask.tolist() == [[True, True], [True, False]]
    assert batch.position_ids[0, 2:].tolist() == [0, 1, 2]
    assert batch.position_ids[1, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "responses"), [([[1], [2]], [[3], []]), ([[1], []], [[3], [4]]), ([[1], [2]], [[3]]), ([], [])]
)
def test_rows_without_a_response_or_prompt_are_refused(prompts: list[list[int]], responses: list[list[int]]) -> None:
    with pytest.raises(AssertionError):
        collate(prompts, responses)


def gradient(name: str, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """d sum log pi(y|x) / d theta, all parameters in a row."""
    total = sequence_logprobs(model(name), collate(prompts, responses)).sum()
    parts = torch.autograd.grad(total, list(model(name).parameters()))
    return torch.cat([part.flatten() for part in parts])


@every_model
def test_gradients_add_up_over_rows(name: str) -> None:
    """Padding adds nothing to a gradient, and no nan: the batch's is the sum of those of its rows alone."""
    together = gradient(name, PROMPTS, RESPONSES)
    alone = sum(gradient(name, [x], [y]) for x, y in zip(PROMPTS, RESPONSES, strict=True))
    assert isinstance(alone, Tensor)
    assert together.norm() > 1
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * together.abs().max().item())


@every_model
def test_following_the_gradient_raises_the_log_prob_as_it_says(name: str) -> None:
    """log pi(theta + h g) - log pi(theta - h g) = 2 h |g|^2 for small h."""
    torch.manual_seed(1)
    policy = type(model(name))(model(name).config).double().eval()
    batch = collate(PROMPTS[:2], RESPONSES[:2])
    parameters = list(policy.parameters())
    parts = torch.autograd.grad(sequence_logprobs(policy, batch).sum(), parameters)
    squared = sum(part.square().sum().item() for part in parts)
    step = 1e-2 / squared  # a change of about 0.02 nats: above float32 rounding, below curvature
    values = []
    with torch.no_grad():
        for move in (step, -2 * step):
            for parameter, part in zip(parameters, parts, strict=True):
                parameter += move * part
            values.append(sequence_logprobs(policy, batch).sum().item())
    assert values[0] - values[1] == pytest.approx(2 * step * squared, rel=0.02)


def test_half_precision_logits_are_read_in_single() -> None:
    """The log-softmax of bfloat16 logits is taken in float32: probabilities of one token still sum to 1."""
    policy = LlamaForCausalLM(model("llama").config).bfloat16().eval()
    with torch.no_grad():
        batch = collate([[1, 2]] * VOCABULARY, [[v] for v in range(VOCABULARY)])
        tokens = token_logprobs(policy, batch)
    assert tokens.dtype == torch.float32
    assert tokens.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
