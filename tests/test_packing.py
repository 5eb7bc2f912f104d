"""Packed rows give what every answer gives read by itself: log-probs, gradients, over families of models."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, HEADS, SHAPE, WINDOW
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PhiConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RobertaConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from spin_reg import branches, products, sampling, scorer, sizes, trial
from spin_reg.branches import attend
from spin_reg.errors import ConfigError
from spin_reg.fit import _without_dropout
from spin_reg.logprobs import cache_name, collate, takes, token_logprobs
from spin_reg.packing import Group, cut, lengths, pack, sums
from spin_reg.scorer import Scorer, reads_packed

GROUPS = [
    Group([1, 2, 3], ([4, 5, 39], [6, 1, 2, 7, 8])),
    Group([9], ([3, 39],)),
    Group(list(range(4, 17)), ([1], [2, 6, 3, 39], [7] * 6)),
    Group([5, 5], ([39],)),
]
SHORT = st.lists(st.integers(1, 3), min_size=1, max_size=4)
LOUD = 1000  # times the weights of a head that a random model begins with
FAR = 64  # a window that none of the groups fills


def build(name: str, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = FAMILIES[name]()
    if getattr(config, "sliding_window", None) == WINDOW:
        config.sliding_window = FAR
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return model.to(dtype).eval()


def plain(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Every answer read by itself, without companions or padding: the reference."""
    return torch.cat([token_logprobs(model, collate([g.prompt], [answer]))[0] for g in groups for answer in g.answers])


every_family = pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in FAMILIES for a in ("eager", "sdpa") if (n, a) != ("gemma2", "sdpa")]
)


@every_family
def test_packed_rows_are_plain_ones(name: str, attention: str) -> None:
    """To 1e-5 a token in float32. With eager attention, as Gemma 2's, answers are read one by one."""
    model = build(name, attention)
    policy = Scorer(model)
    assert policy.packs == (attention == "sdpa")
    with torch.no_grad():
        assert (policy(GROUPS) - plain(model, GROUPS)).abs().max() < 1e-5
        single = [Group(g.prompt, g.answers[:1]) for g in GROUPS]
        assert (policy(single) - plain(model, single)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradients_are_those_of_plain_rows(name: str) -> None:
    """Of a loss that weights every token differently; also where logits are made again for the gradient."""
    model = build(name, "sdpa")
    weights = torch.linspace(-1, 2, sum(len(a) for g in GROUPS for a in g.answers))
    parameters = list(model.parameters())
    wanted = torch.autograd.grad((plain(model, GROUPS) * weights).sum(), parameters)
    for kept, chunk, few in ((2**27, 2**24, 2**19), (0, 3 * 40, 2**19), (2**27, 3 * 40, 2**19), (2**27, 2**24, 2 * 40)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scorer, "IN_CACHE", few)
            patch.setattr(scorer, "LOGITS_KEPT", kept)
            patch.setattr(scorer, "LOGITS_AT_ONCE", chunk)
            found = torch.autograd.grad((Scorer(model)(GROUPS) * weights).sum(), parameters)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.skipif(not products._mkl_is_slow(), reason="MKL on its maker's CPUs rounds a row otherwise beside others")
def test_a_token_read_alone_has_the_bits_that_it_has_among_others() -> None:
    """With more than one thread PyTorch sums a single long row in parts, and several rows each in one go."""
    states, targets = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) * 3000
    head, threads = torch.nn.Linear(8, 2**16, bias=False), torch.get_num_threads()
    with torch.no_grad():
        head.weight.copy_(torch.randn(2**16, 8, generator=torch.Generator().manual_seed(1)))
    torch.set_num_threads(2)
    try:
        together = scorer._HeadLogprobs.apply(states, head.weight.detach(), None, targets)
        alone = [
            scorer._HeadLogprobs.apply(states[i, None], head.weight.detach(), None, targets[i, None]) for i in range(12)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    """A layer that is made again for the gradient unfolds its slots again."""
    gradients = []
    for checkpointing in (False, True):
        model = build("llama", "sdpa")
        _without_dropout(model, checkpointing)
        gradients.append(torch.autograd.grad(Scorer(model)(GROUPS).sum(), list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_under_autocast_are_those_of_float32_but_for_rounding() -> None:
    model = build("llama", "sdpa")
    exact = torch.autograd.grad(Scorer(model)(GROUPS).sum(), list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = Scorer(model)(GROUPS).sum()
    for one, other in zip(torch.autograd.grad(total, list(model.parameters())), exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.995


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_reads_no_answer_the_plain_way(precision: str, train: Callable[..., Path]) -> None:
    """But for the trial: one that fails by mistake would only cost time, and show nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "_found", {})
        patch.setattr(scorer.Scorer, "forward", packed_alone)
        train(f"hardware.precision={precision}", "regularizer=kl", "schedule.iterations=1")


def packed_alone(policy: Scorer, groups: Sequence[Group]) -> Tensor:
    assert policy.packs
    return scorer.packed_logprobs(policy.model, pack(groups, policy.model.device))


def test_the_head_is_differentiated_as_torch_would() -> None:
    """With a bias, against autograd in double precision; frozen weights get no gradient."""
    torch.manual_seed(0)
    states, weight = torch.randn(7, 5, dtype=torch.double), torch.randn(11, 5, dtype=torch.double)
    bias, targets, g = torch.randn(11, dtype=torch.double), torch.randint(11, (7,)), torch.randn(7)
    leaves = [x.requires_grad_() for x in (states, weight, bias)]
    reference = torch.nn.functional.linear(*leaves).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    wanted = torch.autograd.grad((reference * g).sum(), leaves)
    low = [x.detach().float().requires_grad_() for x in leaves]
    found = torch.autograd.grad((scorer._HeadLogprobs.apply(*low, targets) * g).sum(), low)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    made = scorer._HeadLogprobs.apply(low[0], low[1].detach(), None, targets)
    (alone,) = torch.autograd.grad((made * g).sum(), [low[0]])
    reference = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(
        alone.double(), torch.autograd.grad((reference * g).sum(), leaves[0])[0], rtol=1e-4, atol=1e-5
    )


def test_a_head_with_a_bias_is_differentiated_under_autocast_when_its_logits_are_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PhiConfig(**SHAPE)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[PhiConfig](config).eval()
    policy, made = Scorer(model), []
    assert policy.packs and model.get_output_embeddings().bias is not None
    for kept in (scorer.LOGITS_KEPT, 0):
        monkeypatch.setattr(scorer, "LOGITS_KEPT", kept)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = policy(GROUPS).sum()
        made.append(torch.autograd.grad(total, model.get_output_embeddings().bias)[0])
    assert made[0].abs().max() > 0.1 and torch.equal(*made)


def test_bfloat16_moves_log_probs_by_rounding_alone() -> None:
    """Weights in bfloat16, and autocast over float32 weights: near the plain path of the same arithmetic."""
    low = build("llama", "sdpa", torch.bfloat16)
    with torch.no_grad():
        assert Scorer(low).packs
        assert (Scorer(low)(GROUPS) - plain(low, GROUPS)).abs().max() < 0.1
        model = build("llama", "sdpa")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, wanted = Scorer(model)(GROUPS), plain(model, GROUPS)
        assert found.dtype == torch.float32 and (found - wanted).abs().max() < 0.1
        assert not torch.equal(found, Scorer(model)(GROUPS))


def test_a_model_that_rounds_much_is_read_packed_too() -> None:
    """A loud head over weights in bfloat16: rounding of attention moves log-probs by nats, and is no way of reading."""
    low = build("llama", "sdpa", torch.bfloat16)
    with torch.no_grad():
        low.get_output_embeddings().weight.mul_(LOUD)
        moved = []
        for tiles in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(scorer, "_found", {})
                patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
                policy = Scorer(low)
                assert policy.packs
                moved.append(policy(GROUPS))
    if not torch.cpu._is_amx_tile_supported():
        assert (moved[0] - moved[1]).abs().max() > 0.5


OTHERS = {
    "scaled logits": lambda: CohereConfig(**SHAPE, logit_scale=0.5),
    "capped logits": lambda: Gemma2Config(**SHAPE, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "a state space": lambda: MambaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=None, pad_token_id=None
    ),
    "biases by distance": lambda: BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("what", OTHERS)
def test_models_that_read_packed_rows_otherwise_are_found_out(
    what: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_found", {})
    config = OTHERS[what]()
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that what is read otherwise shows
    if rounds:
        round_by_shape(model)
    assert not reads_packed(model)


SMALL = {
    "scaled logits": lambda: CohereConfig(**SHAPE, logit_scale=0.5),
    "capped logits": lambda: Gemma3TextConfig(**SHAPE, **HEADS, final_logit_softcapping=30.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", SMALL)
def test_what_is_done_to_small_logits_is_found_out_too(
    what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers begins them log-probs spread by 0.1 nats, which is less than bfloat16 may move them."""
    monkeypatch.setattr(scorer, "_found", {})
    config = SMALL[what]()
    config.initializer_range = 0.02
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).eval()
    assert plain(model, GROUPS).std() < 0.2
    assert not reads_packed(model)


def test_a_model_that_attends_to_chosen_tokens_is_read_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as short as those tried have fewer tokens than are chosen; and such models ask for attention by its name."""
    sparse = pytest.importorskip("transformers.models.deepseek_v32")
    monkeypatch.setattr(scorer, "_found", {})
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6}
    chosen = {"index_topk": 20, "index_head_dim": 16, "index_n_heads": 2, "n_routed_experts": 4, "n_group": 1}
    experts = {"topk_group": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    shape = SHAPE | {"num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1}
    torch.manual_seed(0)
    model = sparse.DeepseekV32ForCausalLM(sparse.DeepseekV32Config(**shape, **ranks, **chosen, **experts)).eval()
    prompt, answer = list(range(1, 31)), list(range(30, 10, -1))
    policy = Scorer(model)
    assert not policy.packs and model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        found = policy([Group(prompt, (answer,))])
        assert (found - trial.by_itself(model, prompt, answer)).abs().max() < 1e-5


def test_the_window_of_a_model_that_reads_pictures_too_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text model's settings are a part of all, as Gemma 3's of 4B weights and more."""
    monkeypatch.setattr(scorer, "_found", {})
    text = FAMILIES["gemma3"]().to_dict() | {"sliding_window": 24}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[Gemma3Config](config).eval()
    assert scorer.window(model) == 24 and sizes.positions_of(config.to_dict()) == 128
    prompt, answer = list(range(1, 31)), list(range(30, 10, -1))
    policy, short = Scorer(model), [Group(prompt[:9], (answer[:8], answer[3:9]))]
    assert policy.packs
    with torch.no_grad():
        for groups in (short, [Group(prompt, (answer,))]):
            wanted = [trial.by_itself(model, g.prompt, a) for g in groups for a in g.answers]
            assert (policy(groups) - torch.cat(wanted)).abs().max() < 1e-5
    points = torch.rand(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sampling.sample(model, [prompt, prompt[:3]], points, ends=(39,), temperature=1.0, top_p=1.0)
    with torch.no_grad():
        for row, made in zip([prompt, prompt[:3]], drawn, strict=True):
            assert (torch.tensor(made.logprobs) - trial.by_itself(model, row, made.ids)).abs().max() < 1e-5


def test_a_state_space_draws_what_it_scores() -> None:
    """Rows of it stand alone: a mask of all columns would be laid over the newest token's states."""
    torch.manual_seed(0)
    model = MambaForCausalLM(OTHERS["a state space"]()).eval()
    if not takes(model, cache_name(model)):
        pytest.skip("in this release of transformers it has a cache of its own kind: it is refused, see below")
    prompts = [g.prompt for g in GROUPS]
    points = torch.rand(len(prompts), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sampling.sample(model, prompts, points, ends=(39,), temperature=1.0, top_p=1.0)
    assert max(len(made.ids) for made in drawn) > 6
    with torch.no_grad():
        for prompt, made in zip(prompts, drawn, strict=True):
            assert (torch.tensor(made.logprobs) - trial.by_itself(model, prompt, made.ids)).abs().max() < 1e-5


def test_a_model_that_takes_no_cache_is_not_drawn_from() -> None:
    """It would be told the newest token alone, and nothing would say so."""
    torch.manual_seed(0)
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=40, n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(ConfigError, match="cannot be drawn") as raised:
        sampling.sample(model, [[1]], torch.zeros(1, 2, dtype=torch.float64), ends=(2,), temperature=1.0, top_p=1.0)
    assert "OpenAIGPTLMHeadModel" in str(raised.value)


PADDED_OTHERWISE = {
    "a state that reads padding": lambda: RecurrentGemmaConfig(
        **SHAPE | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=64
    ),
    "positions that count from elsewhere": lambda: RobertaConfig(**SHAPE | {"pad_token_id": 0}, is_decoder=True),
}


@pytest.mark.parametrize(
    ("what", "dtype"),
    [*((what, torch.float32) for what in PADDED_OTHERWISE), ("positions that count from elsewhere", torch.bfloat16)],
)
def test_a_model_that_padding_changes_is_refused(
    what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_found", {})
    config = PADDED_OTHERWISE[what]()
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).eval()
    with pytest.raises(ConfigError, match="beside others as it reads it by itself") as raised:
        reads_packed(model)
    assert type(model).__name__ in str(raised.value)


@pytest.mark.parametrize(("weight", "packs"), [(math.nan, False), (0.0, True)])
def test_weights_that_say_nothing_are_no_way_of_reading(
    weight: float, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diverged model has an error of its own; and where all log-probs are alike they do not spread at all."""
    monkeypatch.setattr(scorer, "_found", {})
    model = build("llama", "sdpa")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(weight)
    assert reads_packed(model) == packs


def round_by_shape(model: PreTrainedModel) -> None:
    """As on a GPU: what a layer gives for a row hangs in its last bits on how many rows there are."""

    def rounded(layer: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(made.numel()), dtype=made.dtype)
        return made * (1 + 1e-7 * noise)

    for layer in model.base_model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(rounded)


def test_rounding_that_hangs_on_companions_is_no_other_way_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model would be read the slow way on a GPU, and only a line in a log would say so."""
    for noise, packs in ((0, False), (trial.NOISE, True)):
        monkeypatch.setattr(scorer, "_found", {})
        monkeypatch.setattr(trial, "NOISE", noise)
        model = build("llama", "sdpa")
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(LOUD / 10)
        round_by_shape(model)
        assert reads_packed(model) == packs


def test_gradients_of_a_slot_that_many_rows_share_are_summed_in_float32() -> None:
    """By PyTorch itself: added up in bfloat16, 300 ones would stay at 256."""
    states = torch.zeros(1, 1, 4, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = branches._unfolded(states, torch.tensor([[0, 1 + i % 3] for i in range(300)]))
    assert rows.dtype == torch.bfloat16 and rows.shape == (300, 1, 2, 1)
    (made,) = torch.autograd.grad(rows.sum(), states)
    assert made.flatten().tolist() == [300.0, 100.0, 100.0, 100.0]


def test_rows_longer_than_a_window_are_read_the_plain_way() -> None:
    config = FAMILIES["mistral"]()
    config.sliding_window, config._attn_implementation = 17, "sdpa"
    groups = [*GROUPS, Group(list(range(4, 17)), ([7, 5] * 8, [2, 6]))]
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    policy = Scorer(model)
    assert policy.packs and max(g.longest for g in groups) > 17 > GROUPS[0].longest
    with torch.no_grad():
        for some in (groups, groups[:2]):
            assert (policy(some) - plain(model, some)).abs().max() < 1e-5
        assert (scorer.packed_logprobs(model, pack(groups)) - plain(model, groups)).abs().max() > 1e-3


def test_a_prompt_is_read_once_and_no_logits_are_made_but_those_that_are_read() -> None:
    model, seen = build("llama", "sdpa"), []
    handle = model.model.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    policy = Scorer(model)
    seen.clear()
    with torch.no_grad():
        policy(GROUPS)
    handle.remove()
    (ids,) = seen
    assert ids.tolist() == [[t for g in GROUPS for part in (g.prompt, *(a[:-1] for a in g.answers)) for t in part]]
    assert ids.shape == (1, sum(g.slots for g in GROUPS)) and ids.tolist()[0].count(16) == 1


def test_every_answer_unfolds_into_a_causal_row_of_its_own() -> None:
    packed = pack(GROUPS)
    ids, places = packed.input_ids[0], packed.position_ids[0]
    rows = sorted(([*g.prompt, *answer[:-1]] for g in GROUPS for answer in g.answers), key=len)
    found = [slots for block in packed.unfold for slots in block]
    for slots, row in zip(found, rows, strict=True):
        assert ids[slots][: len(row)].tolist() == row
        assert places[slots][: len(row)].tolist() == list(range(len(row)))
    flat = torch.cat([block.flatten() for block in packed.unfold])
    assert flat[packed.fold].tolist() == list(range(sum(g.slots for g in GROUPS)))


def test_the_bits_of_attention_do_not_tell_what_was_read_beside() -> None:
    """All these prompts begin alike, and answers of the same prompt, so that most slots are shared."""
    torch.manual_seed(0)
    groups = [Group([1] * n, ([2] * m, [3])) for n, m in ((15, 6), (18, 9), (23, 4), (34, 21), (90, 30), (85, 44))]
    together, module = pack(groups), nn.Module()
    module.num_key_value_groups = 3
    states = [torch.randn(1, heads, together.input_ids.shape[1], 64) for heads in (9, 3, 3)]
    made, rows = attend(module, *states, None, together)[0], iter(together.rows)
    for group in groups:
        single = pack([group])
        there = dict(zip(itertools.chain(*single.rows), itertools.chain(*itertools.islice(rows, 2)), strict=True))
        slots = [there[slot] for slot in range(group.slots)]
        alone, _ = attend(module, *(part[:, :, slots] for part in states), None, single)
        assert torch.equal(alone, made[:, slots])


@given(st.lists(st.tuples(SHORT, st.lists(SHORT, min_size=1, max_size=3)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_what_rows_begin_with_in_common_has_one_slot(drawn: list[tuple[list[int], list[list[int]]]]) -> None:
    groups = [Group(prompt, tuple(answers)) for prompt, answers in drawn]
    packed = pack(groups)
    ids, places = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    branches = [[*g.prompt, *answer[:-1]] for g in groups for answer in g.answers]
    assert [[ids[slot] for slot in row] for row in packed.rows] == branches
    assert all([places[slot] for slot in row] == list(range(len(row))) for row in packed.rows)
    assert len(ids) == len({tuple(branch[: n + 1]) for branch in branches for n in range(len(branch))})
    assert len(ids) <= sum(g.slots for g in groups)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_rows_that_begin_alike_are_plain_ones(name: str) -> None:
    """Log-probs and gradients where a system prompt, whole prompts and the beginnings of answers are shared."""
    system = list(range(4, 24))
    groups = [
        Group([*system, 1, 2], ([5, 6, 7, 39], [5, 6, 8], [5, 6, 7, 39])),
        Group([*system, 1, 3], ([5, 6, 7, 39], [9])),
        Group(system, ([1, 2, 5, 6, 7, 8], [1, 3])),  # its answers are as the prompts above
        Group([*system, 1, 2], ([5, 6, 9, 9, 39],)),
        Group([9, 9], ([5, 39],)),
    ]
    model = build(name, "sdpa")
    weights, parameters = torch.linspace(-1, 2, sum(lengths(groups))), list(model.parameters())
    wanted, found = plain(model, groups), Scorer(model)(groups)
    assert (found - wanted).abs().max() < 1e-5
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), parameters),
        torch.autograd.grad((wanted * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_is_that_of_float32_rounded_once(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has no tiles for bfloat16; where it has them, PyTorch's own kernel is as near as its rounding."""
    packed, module = pack(GROUPS), nn.Module()
    module.num_key_value_groups = 3
    torch.manual_seed(0)
    low = [torch.randn(1, n, packed.input_ids.shape[1], 64).bfloat16().requires_grad_() for n in (9, 3, 3)]
    high = [states.detach().float().requires_grad_() for states in low]
    exact = attend(module, *high, None, packed)[0]
    exact.sin().sum().backward()
    for tiles in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            made = attend(module, *low, None, packed)[0]
        assert made.dtype == torch.bfloat16 and torch.equal(made, exact.bfloat16()) is not tiles
        torch.testing.assert_close(made.float(), exact, atol=2e-2, rtol=1e-2)
        grads = torch.autograd.grad(made.float().sin().sum(), low)
        for grad, states in zip(grads, high, strict=True):
            assert states.grad is not None and grad.dtype == torch.bfloat16
            torch.testing.assert_close(grad.float(), states.grad, atol=5e-2, rtol=5e-2)


def test_queries_in_float32_over_values_in_bfloat16_are_rounded_as_autocast_does() -> None:
    """As a norm over queries gives them: drawing rounds them, and scoring must not be of another query."""
    packed, module = pack(GROUPS), nn.Module()
    module.num_key_value_groups = 3
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, packed.input_ids.shape[1], 64) for n in (9, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = attend(module, query, key, value.bfloat16(), None, packed)[0]
        rounded = attend(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, packed)[0]
    assert torch.equal(made.bfloat16(), rounded)


def test_rows_of_like_length_go_through_attention_together() -> None:
    groups = [Group([1] * n, ([2] * n,)) for n in (100, 10, 99, 60, 11)]
    assert [tuple(block.shape) for block in pack(groups).unfold] == [(2, 32), (1, 128), (2, 208)]


def test_sums_are_those_of_answers() -> None:
    counts = lengths(GROUPS)
    logprobs = torch.randn(sum(counts))
    wanted = [math.fsum(part.tolist()) for part in logprobs.split(counts)]
    assert len(wanted) == 7 and sums(logprobs, GROUPS).tolist() == pytest.approx(wanted, abs=1e-12)
    assert pack(GROUPS).targets.tolist() == list(itertools.chain(*(a for g in GROUPS for a in g.answers)))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120), st.none() | st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_batches_hold_every_row_once_and_no_more_than_they_may(slots: list[int], tokens: int, most: int | None) -> None:
    batches = cut(slots, tokens=tokens, most=most)
    assert sorted(itertools.chain(*batches)) == list(range(len(slots)))
    for rows in batches:
        assert len(rows) <= (most or len(slots))
        assert len(rows) == 1 or sum(slots[i] for i in rows) <= tokens
    flat = [slots[i] for i in itertools.chain(*batches)]
    assert flat == sorted(flat)


@pytest.mark.parametrize("group", [Group([], ([1],)), Group([1], ([],)), Group([1], ())])
def test_nothing_empty_is_scored(group: Group) -> None:
    with pytest.raises(AssertionError):
        pack([group])
