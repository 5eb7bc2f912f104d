"""A policy as a module from answers to their log-probs: the one door through which scoring and training go."""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from spin_reg import branches, trial
from spin_reg.logprobs import cache_name, collate, token_logprobs
from spin_reg.packing import Group, Packed, pack
from spin_reg.products import Linear, plainly, product
from spin_reg.sizes import LOGITS_AT_ONCE, LOGITS_KEPT

log = logging.getLogger(__name__)
IN_CACHE = 2**19  # logits that are looked at together on a CPU: 2 MB in float32, which stay in its cache
_found: dict[str, bool] = {}  # what `reads_packed` found, by architecture


class Scorer(nn.Module):
    """log pi(y_j | x, y_<j) of answers that share prompts.

    Packed where the model reads such rows as it reads plain ones (`reads_packed`); else by the plain path, a prompt
    with each of its answers.

    Args:
        packs: what `reads_packed` found of the same model elsewhere; None: it is asked, which reads all weights.
    """

    def __init__(self, model: PreTrainedModel, packs: bool | None = None) -> None:
        super().__init__()
        self.model = model
        if packs:
            _inner(model).set_attn_implementation(branches.NAME)
        self.packs = reads_packed(model) if packs is None else packs

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """(n,) float32 nats: the tokens of all answers, in the order of groups and answers."""
        if self.packs and max(group.longest for group in groups) < window(self.model):
            return packed_logprobs(self.model, pack(groups, self.model.device))
        prompts = [group.prompt for group in groups for _ in group.answers]
        answers = [answer for group in groups for answer in group.answers]
        batch = collate(prompts, answers).to(self.model.device)
        return token_logprobs(self.model, batch)[batch.response_mask]


def packed_logprobs(model: PreTrainedModel, packed: Packed) -> Tensor:
    """The log-probs of `Scorer.forward` in one pass over packed slots; logits are made of the slots that need them."""
    states, head = _states(model, packed)
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    head_logprobs: Callable[..., Tensor] = _HeadLogprobs.apply
    return head_logprobs(states.to(dtype), head.weight, head.bias, packed.targets)


def _states(model: PreTrainedModel, packed: Packed) -> tuple[Tensor, Any]:
    """(n, hidden): the last states at the slots before the targets; and the head."""
    states, head = slot_states(model, packed.input_ids, packed.position_ids, packed)
    return states.index_select(0, packed.before), head


def slot_states(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, slots: Packed | branches.Newest, cache: Cache | None = None
) -> tuple[Tensor, Any]:
    """(T, hidden): the last states of (1, T) slots, which attend as it is told; and the head.

    Not by the model's own forward, which in some releases of transformers does not hand on what it is told.
    """
    inner = _inner(model)
    hidden: Tensor = inner.base_model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),  # else positions that begin anew would make a mask
        position_ids=positions,
        use_cache=cache is not None,
        branches=slots,
        **({} if cache is None else {cache_name(inner.base_model): cache}),
    ).last_hidden_state
    return hidden[0], inner.get_output_embeddings()


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(h W' + b)[target] row by row, so many rows at a time that logits of all never are in memory.

    With p the softmax and g the gradient of a row's log-prob, that of its logits is g (onehot(target) - p). Products
    are made in the dtype of the states, as autocast would, the sums over rows in that of the weights.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needed, ctx.exact = any(ctx.needs_input_grad), weight.dtype
        weight = weight.to(states.dtype)
        keeps = needed and targets.numel() * weight.shape[0] <= LOGITS_KEPT
        ctx.bias, ctx.kept = bias, [] if keeps else None
        made, normalisers = [], []
        for rows in _chunks(targets, weight):
            logits = product(states[rows], weight, bias)
            normaliser = _normalisers(logits)
            made.append(logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1).float() - normaliser)
            normalisers.append(normaliser)
            if keeps:
                ctx.kept.append(logits)
        if needed:
            ctx.save_for_backward(states, weight, targets, torch.cat(normalisers))
        return torch.cat(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        states, weight, targets, normalisers = ctx.saved_tensors
        to_states, to_weight, to_bias, _ = ctx.needs_input_grad
        of_states = torch.empty_like(states) if to_states else None
        of_weight = torch.zeros_like(weight, dtype=ctx.exact) if to_weight else None
        of_bias = torch.zeros_like(ctx.bias) if to_bias else None
        bias = None if ctx.bias is None else ctx.bias.to(states.dtype)  # here autocast, which casts it, is off
        for i, rows in enumerate(_chunks(targets, weight)):
            logits = product(states[rows], weight, bias) if ctx.kept is None else ctx.kept[i]
            if ctx.kept is not None:
                ctx.kept[i] = None  # overwritten below
            columns = [values[rows].unsqueeze(1) for values in (normalisers, grad, targets)]
            for some in few_at_once(logits):
                normaliser, scale, target = (values[some] for values in columns)
                slope = logits[some].float().sub_(normaliser).exp_().mul_(-scale).scatter_add_(1, target, scale)
                if of_bias is not None:
                    of_bias += slope.sum(dim=0)
                logits[some] = slope
            slope = logits
            if of_states is not None:
                of_states[rows] = product(slope, weight.t())
            if of_weight is not None and of_weight.dtype == states.dtype:
                of_weight.addmm_(slope.T, states[rows])
            elif of_weight is not None:
                of_weight += slope.T @ states[rows]
        return of_states, of_weight, of_bias, None


def _chunks(targets: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // weight.shape[0])
    return _parts(targets.numel(), math.ceil(targets.numel() / size))


def few_at_once(logits: Tensor) -> list[slice]:
    """Rows in parts, one after the other: on a CPU so few that what is done to each finds it in the cache."""
    few = len(logits) if logits.device.type != "cpu" else max(1, IN_CACHE // logits.shape[1])
    return _parts(len(logits), max(1, len(logits) // few))


def _parts(rows: int, count: int) -> list[slice]:
    """Even ones, so that none is a single row, whose sums PyTorch deals to threads and so rounds otherwise."""
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(bounds)]


def _normalisers(logits: Tensor) -> Tensor:
    """(n,) float32: log of the sum of exp over the vocabulary, of a row the same bits whatever the others are."""
    rows = logits if len(logits) > 1 else logits.expand(2, -1)
    return torch.cat([rows[some].float().logsumexp(dim=-1) for some in few_at_once(rows)])[: len(logits)]


def _inner(model: Any) -> Any:
    """The causal language model itself, under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The settings of the language model: of one that reads pictures too they are a part of all."""
    return _inner(model).config.get_text_config(decoder=True)


def window(model: PreTrainedModel) -> float:
    """Tokens up to which one sees all that stands before it: some architectures look back only so far."""
    windows = [getattr(text_config(model), name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=math.inf)


def reads_packed(model: PreTrainedModel) -> bool:
    """Whether a model reads packed rows as it reads plain ones: tried out once for every architecture.

    It must go through the attention interface of transformers, take positions, see nothing of another branch, see all
    that stands before a token, and make its logits by one plain linear layer from its last states. Models with state
    spaces, attention of their own or to chosen tokens alone, or scaled or capped logits do not. From here on its
    attention is `branches.attend`, elsewhere the same as `sdpa`.

    Raises:
        ConfigError: it does not read padded rows beside others as it reads each by itself.
    """
    inner = _inner(model)
    attention, kept = _attention(inner), architecture(model)
    if kept not in _found:
        with plainly(), torch.autocast(inner.device.type, enabled=False):
            alone = trial.alone(model, type(inner).__name__)
            _found[kept] = attention == "sdpa" and _may_pack(inner) and _tried(model, alone)
    inner.set_attn_implementation(branches.NAME if _found[kept] else attention)
    if not _found[kept]:
        log.info("%s does not read prompts with several answers: each is read by itself", type(inner).__name__)
    return _found[kept]


def architecture(model: PreTrainedModel) -> str:
    """What decides how a model reads, whatever its weights are: an adapter on the head does too."""
    inner, first = _inner(model), next(model.parameters())
    parts = (type(inner).__name__, _plain(inner), _attention(inner), first.dtype, first.device.type)
    return f"{' '.join(map(str, parts))} {inner.config.to_json_string()}"


def _plain(inner: Any) -> bool:
    """Whether the head is one linear layer, without an adapter on it."""
    return type(inner.get_output_embeddings()) in (nn.Linear, Linear)


def _attention(inner: Any) -> str:
    """The attention that a model has where it is not ours."""
    found = str(inner.config._attn_implementation)
    return "sdpa" if found == branches.NAME else found


def _may_pack(inner: Any) -> bool:
    """Whether it is worth a trial; where few tokens are attended to, these are all of rows as short as those tried."""
    chosen = any(name.startswith("index_topk") for name in text_config(inner).to_dict())
    return _plain(inner) and not chosen and window(inner) >= trial.LENGTH


def _tried(model: PreTrainedModel, alone: trial.Alone) -> bool:
    _inner(model).set_attn_implementation(branches.NAME)
    try:
        return trial.plain_head(_inner(model)) and trial.packs(
            model, alone, lambda groups: packed_logprobs(model, pack(groups, _inner(model).device))
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        log.info("packed rows were refused: %s", error)
        return False
