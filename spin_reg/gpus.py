"""What sets GPUs apart: kernels that take shapes as they come, and such as give the same bits every time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spin_reg.errors import ConfigError

CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it cuBLAS promises no bits, and PyTorch refuses its products
REFUSED = "does not have a deterministic implementation"


def settle() -> None:
    """Before the first use of a GPU in this process. Float32 is float32 there.

    cuDNN's attention, which PyTorch prefers on newer GPUs in bfloat16, plans anew for every shape: each token that is
    drawn makes the cache longer by one, and a batch of ours is hardly ever as long as another. Its plans took longer
    than all else: SmolLM2 drew a third as many tokens a second in bfloat16 as in float32, on an H200.
    """
    for name, value in CUBLAS.items():
        os.environ.setdefault(name, value)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")  # some containers have float32 multiplied in TF32, of 10 bits


@contextmanager
def repeatable(wanted: bool, where: str) -> Iterator[None]:
    """Inside, what is computed comes out the same bit by bit every time, if that is wanted; sums of gradients on GPUs
    do not else. What a GPU's kernels make of shapes is no part of it: other batches round otherwise.

    Raises:
        ConfigError: the model needs an operation that has no such kernel; or the environment sets cuBLAS otherwise.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # the module declares its one property in a way that mypy does not see
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with a warning in place of the error, attention's would be as before
    memory.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        (setting,) = CUBLAS
        if setting in str(error):
            raise ConfigError(
                "cuBLAS is not set so that it gives the same bits every time.",
                where=f"{setting}={os.environ.get(setting)} in the environment",
                why="PyTorch takes :4096:8 and :16:8 for that, and no other",
                todo="leave it out (spin-reg sets it), or give hardware.deterministic=false",
            ) from error
        if REFUSED not in str(error):
            raise
        raise ConfigError(
            "The model needs an operation that does not give the same bits every time here.",
            where=where,
            why=str(error).split(REFUSED)[0].strip() + f" {REFUSED} in PyTorch on this device",
            todo="give hardware.deterministic=false: then what is resumed or made again differs in its last bits",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
