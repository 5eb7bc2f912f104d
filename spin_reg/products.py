"""Products with a model's weights while answers are drawn on a CPU: oneDNN's, on weights that are laid out for it once.

Drawing multiplies every weight by a few rows, step after step. PyTorch would lay weights in bfloat16 out anew for every
product, and gives float32 to MKL, which on some CPUs (AMD's with AVX512) uses half the width of their registers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """Inside, plain linear layers on a CPU multiply by a copy of their weights; all other modules are left alone.

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


def _plain(layer: nn.Linear) -> bool:
    """Whether a layer is a linear one and no more: not one that packs its weights, or whose forward was replaced."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and fits(layer.weight.device, _dtype(layer))


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
