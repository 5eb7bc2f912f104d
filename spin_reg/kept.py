"""What specs of stages are made of: how a finished stage is treated, and how an iterate's folder is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from spin_reg.settings import Dtype, Quantize, runtime


@dataclass(frozen=True)
class Policy:
    """How an iterate's folder is loaded: the dtype on disk is the dtype in use."""

    dtype: Dtype
    attn_implementation: str | None
    layout: tuple[int | None, ...] | None  # batch sizes, where arithmetic is so coarse that they change results
    quantize: Quantize = Quantize.none
    trust_remote_code: bool = runtime(False)  # the code is part of the model's hash
    base: str | None = runtime(None)  # where the base of a run lies by now; it is found by its hash


class Kept:
    """How a finished stage is treated.

    Attributes:
        precious: damaged files are refused by name; those of other stages are made again.
        remade: other settings or inputs make it anew; for other stages they are refused.
        hashed: fields that are the hash of something, and what that is called.
    """

    precious: ClassVar[bool] = False
    remade: ClassVar[bool] = False
    hashed: ClassVar[Mapping[str, str]] = {}
