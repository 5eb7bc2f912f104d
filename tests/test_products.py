"""Weights that are laid out for drawing on a CPU multiply as `nn.Linear` does, for as long as answers are drawn."""

import math

import pytest
import torch
from test_sampling import END, PROMPTS, llama, points
from torch import nn

from spin_reg import products, sampling
from spin_reg.branches import Newest, attend
from spin_reg.columns import Slots, empty

cpu = pytest.mark.skipif(
    not products.fits(torch.device("cpu"), torch.bfloat16), reason="oneDNN has no products of bfloat16 on this CPU"
)


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are multiplied as large ones are."""
    monkeypatch.setattr(products, "LARGE", 1)


class Odd(nn.Linear):
    """Whatever packs its weights otherwise."""


def two(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 33), nn.Linear(33, 7, bias=False), Odd(7, 7)).to(dtype).eval()


@cpu
@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("rows", [1, 5, 64])
@torch.no_grad()
def test_products_are_those_of_linear_layers(rows: int) -> None:
    """In float32, in bfloat16 and under autocast, of rows that are views too; against float64."""
    states = torch.randn(rows, 3, 96)[:, 1:2, ::2]
    exact = two(torch.float64)(states.double())
    for dtype, autocast, near in (
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 0.1),
        (torch.float32, True, 0.1),
    ):
        model = two(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            plain = model(states.to(dtype))
            with products.laid_out(model):
                found = model(states.to(dtype))
        assert found.dtype == plain.dtype and found.shape == plain.shape
        assert (found - exact).abs().max() < near > (found - plain).abs().max()


@cpu
@pytest.mark.usefixtures("all_large")
def test_layers_are_as_they_were_when_drawing_ends_however_it_ends() -> None:
    model = two(torch.float32)
    model[1].forward = replaced = lambda states: states  # as hooks of accelerate do
    with pytest.raises(KeyboardInterrupt), products.laid_out(model):
        assert [("forward" in vars(layer)) for layer in model] == [True, True, False]
        assert model[1].forward is replaced
        raise KeyboardInterrupt
    assert [("forward" in vars(layer)) for layer in model] == [False, True, False]


@cpu
@pytest.mark.usefixtures("all_large")
def test_answers_are_drawn_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, the head among them; and a weight that changes between two calls is seen by the second."""
    model, seen, pick = llama(), [], sampling.pick
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def listening(*args: torch.Tensor, **kwargs: float) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(all("forward" in vars(layer) for layer in layers))
        return pick(*args, **kwargs)

    monkeypatch.setattr(sampling, "pick", listening)
    greedy = {"ends": [END], "temperature": 0.0, "top_p": 1.0}
    sampling.sample(model, PROMPTS, points(len(PROMPTS), 6), **greedy)
    assert seen and all(seen) and len(layers) == 15
    with torch.no_grad():
        model.lm_head.weight.zero_()
    answers = sampling.sample(model, PROMPTS, points(len(PROMPTS), 6), **greedy)
    assert all(answer.ids == [0] * 6 for answer in answers)  # all logits are equal: the first is taken


@cpu
def test_small_layers_of_float32_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a layer of our own costs more than its product gains; in bfloat16 what is laid out pays at any size."""
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    model = nn.Sequential(nn.Linear(256, 255), nn.Linear(256, 256))
    products.quick(model)
    assert [type(layer) for layer in model] == [nn.Linear, products.Linear]
    for dtype, laid in ((torch.float32, [False, True]), (torch.bfloat16, [True, True])):
        with products.laid_out(model.to(dtype)):
            assert [("forward" in vars(layer)) for layer in model] == laid


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_is_its_formula(masked: bool) -> None:
    """softmax(q k' scale) v with six heads on two of keys, in blocks of rows; masked columns may hold anything."""
    torch.manual_seed(0)
    rows, heads, shared, columns, width = 5, 2, 3, 9, 4
    query, key, value = (torch.randn(rows, n, c, width) for n, c in ((6, 1), (heads, columns), (heads, columns)))
    mask = torch.ones(rows, 1, 1, columns, dtype=torch.bool)
    if masked:
        for row in range(rows):
            mask[row, ..., : row + 1] = False
            key[row, :, : row + 1], value[row, :, : row + 1] = 1e9, -1e9
    module = nn.Module()
    module.num_key_value_groups = shared
    newest = Newest(((slice(0, 2), 1 if masked else 0), (slice(2, 5), 3 if masked else 0)), mask)
    made, _ = attend(module, query.transpose(0, 2), key, value, None, newest, scaling=0.7)
    for row in range(rows):
        seen = slice(row + 1 if masked else 0, columns)
        for head in range(heads * shared):
            k, v = key[row, head // shared, seen].double(), value[row, head // shared, seen].double()
            weights = [math.exp(0.7 * float(query[row, head, 0].double() @ one)) for one in k]
            wanted = sum(weight * one for weight, one in zip(weights, v, strict=True)) / sum(weights)
            torch.testing.assert_close(made[0, row, head].double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_under_autocast_the_cache_is_cast_once_and_scores_are_not_rounded() -> None:
    """Queries and keys come in float32 there, since the angles of positions do; attention casts both. Against float64
    of the cast ones: scores of 30 in bfloat16 would be off by up to 0.06, and so the weights.
    """
    torch.manual_seed(0)
    rows, columns, width = 32, 40, 64
    query = torch.randn(1, 4, rows, width)
    layer = empty(rows, columns)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(columns):
            key, value = torch.randn(1, 2, rows, width), torch.randn(1, 2, rows, width).bfloat16()
            layer.slots = Slots(None, newest=True)
            layer.widen(layer.used + 1)
            keys, values = layer.update(12 * key, value)
        assert keys.dtype == values.dtype == torch.bfloat16 and keys.shape == (rows, 2, 2 * columns, width)
        seen = torch.arange(2 * columns).expand(rows, 1, 1, -1) >= columns
        module = nn.Module()
        module.num_key_value_groups = 2
        made, _ = attend(module, query, keys, values, None, Newest(((slice(0, rows), columns - 3),), seen))
    q, k, v = (part.bfloat16().double() for part in (query[0].transpose(0, 1), keys, values))
    k, v = (part[:, :, columns:].repeat_interleave(2, dim=1) for part in (k, v))
    wanted = (torch.einsum("rhd,rhcd->rhc", q, k) / width**0.5).softmax(-1).unsqueeze(-2) @ v
    assert (made[0].double() - wanted.squeeze(-2)).abs().max() < 0.02


@cpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 256), (2, 150, 256)], ids=["few", "large"])
def test_layers_that_train_have_linear_layers_gradients(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64; products with 2^16 weights and more are oneDNN's. A layer stays a linear one to everybody."""
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    exact = nn.Linear(shape[-1], 300, bias=bias).double()
    layer = nn.Linear(shape[-1], 300, bias=bias)
    layer.load_state_dict(exact.state_dict())
    products.quick(model := nn.Sequential(layer))
    assert type(layer) is products.Linear and isinstance(layer, nn.Linear) and list(model.state_dict())
    states, slope = torch.randn(shape).double(), torch.randn(*shape[:-1], 300).double()
    found = []
    for made, kind in ((exact, torch.float64), (layer, torch.float32)):
        rows = states.detach().clone().to(kind).requires_grad_()
        out = made(rows)
        out.backward(slope.to(kind))
        assert rows.grad is not None
        found.append((out, rows.grad, *(p.grad for p in made.parameters())))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    assert layer.weight.numel() >= products.LARGE


@cpu
@pytest.mark.skipif(not products._mkl_is_slow(), reason="on this CPU products in float32 are PyTorch's own")
@pytest.mark.parametrize("width", [256, 576])
def test_the_bits_of_a_row_do_not_tell_its_companions(width: int) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(300, width), torch.randn(900, width)
    together = products.product(rows, weight)
    for count in (1, 2, 8, 33, 500):
        assert torch.equal(products.product(rows[:count], weight), together[:count])


@cpu
def test_under_autocast_and_on_other_machines_layers_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, states = nn.Linear(256, 300), torch.randn(300, 256)
    plain = layer(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(states)
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: False)
    products.quick(layer)
    assert type(layer) is nn.Linear
    layer.__class__ = products.Linear
    assert torch.equal(layer(states), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(states), cast)
