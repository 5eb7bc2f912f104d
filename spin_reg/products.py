"""Products on a CPU: oneDNN's with a model's large weights, laid out for it once while answers are drawn; attention's
dtype.

PyTorch gives float32 to MKL, which on CPUs that are not its maker's uses half the width of their registers. And drawing
multiplies every weight by a few rows, step after step, where weights in bfloat16 would be laid out anew each time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_plainly: list[bool] = []
LARGE = 2**16  # weights from which on a product is oneDNN's, of however few rows: its bits must not tell how many


@lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    """Whether MKL multiplies float32 here and the CPU is not its maker's. Told by name, since a race would now and then
    end otherwise, and with it the last bits of a run.
    """
    there, cpu = torch._C.has_mkl and torch._C._has_mkldnn, Path("/proc/cpuinfo")
    return there and cpu.exists() and "GenuineIntel" not in cpu.read_text(encoding="utf-8", errors="replace")


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, all products are PyTorch's own: for what is about a model and not about how it is multiplied."""
    _plainly.append(True)
    try:
        yield
    finally:
        _plainly.pop()


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows W' + bias, as `linear`, up to rounding; without gradients. rows: (..., in). weight: (out, in)."""
    fits32 = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32
    if fits32 and not _plainly and weight.numel() >= LARGE and _mkl_is_slow():
        if rows.numel() == rows.shape[-1]:  # one row has a kernel of its own, which rounds otherwise
            return product(rows.flatten().expand(2, -1), weight, bias)[0].view(*rows.shape[:-1], -1)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return made
    return linear(rows, weight, bias)


class _Product(torch.autograd.Function):
    """y = x W' + b with dx = dy W, dW = dy' x, db = the sum of dy over rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, weight = ctx.saved_tensors
        to_rows, to_weight, to_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        of_rows = product(grad, weight.t()) if to_rows else None
        of_weight = product(flat.t(), rows.flatten(0, -2).t()) if to_weight else None
        return of_rows, of_weight, flat.sum(dim=0) if to_bias else None


class Linear(nn.Linear):
    """A linear layer whose large products in float32 on a CPU are `product`'s, backward too."""

    def forward(self, states: Tensor) -> Tensor:
        if states.device.type != "cpu" or states.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(states)
        apply: Callable[..., Tensor] = _Product.apply
        return apply(states, self.weight, self.bias)


def quick(model: nn.Module) -> None:
    """Make the large plain linear layers of a model `Linear`s, where that is worth it; others would wait for Python."""
    if not _mkl_is_slow():
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and module.weight.numel() >= LARGE:
            module.__class__ = Linear


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """Inside, plain linear layers on a CPU multiply by a copy of their weights; all other modules are left alone, and
    so are small layers in float32.

    They give what `nn.Linear` gives, up to rounding, without gradients. The copy is in the dtype of the products: under
    autocast it stands in for the one that autocast would keep.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _plain(module)]
    try:
        for layer in layers:
            vars(layer)["forward"] = _multiply(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether numbers lie on a CPU for which oneDNN has quick products of them."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow(states: Tensor) -> bool:
    """Whether attention is no quicker in the dtype of states than in float32, and its gradient slower: of bfloat16 on a
    CPU that does not multiply it tile by tile.
    """
    low = states.dtype == torch.bfloat16 and states.device.type == "cpu" and not _plainly
    return low and not torch.cpu._is_amx_tile_supported()


def _plain(layer: nn.Linear) -> bool:
    """Whether a layer is a linear one and no more (not one that packs its weights, or whose forward was replaced), for
    whose products a copy of its weights pays.
    """
    plain, dtype = type(layer) in (nn.Linear, Linear) and "forward" not in vars(layer), _dtype(layer)
    large = dtype != torch.float32 or layer.weight.numel() >= LARGE  # small ones of float32 would wait for Python
    return plain and large and fits(layer.weight.device, dtype)


def _dtype(layer: nn.Linear) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def _multiply(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """x -> x W' + b."""
    dtype = _dtype(layer)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(states: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states.to(dtype), weight, bias, "none", [], "")
        return product

    return forward
