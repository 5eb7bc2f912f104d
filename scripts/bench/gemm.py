"""A child that measures matrix products when it is asked to: a line in, a line of JSON out.

    python gemm.py THREADS SECONDS

{"fp32": FLOP/s, "bf16": FLOP/s}: the median over square products during SECONDS for each.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch

from spin_reg.products import product


def rate(dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of n * n matrix products, 2 n^3 each, by the quicker of PyTorch's own and ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 4096 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return max(_rate(partial(multiply, a, b), n, seconds / 2) for multiply in (torch.matmul, product))


def _rate(multiply: Callable[[], torch.Tensor], n: int, seconds: float) -> float:
    multiply()
    times: list[float] = []
    while not times or sum(times) < seconds:
        began = perf_counter()
        multiply()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return 2 * n**3 / median(times)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    for _ in sys.stdin:
        found = {"fp32": torch.float32, "bf16": torch.bfloat16}
        print(json.dumps({name: rate(dtype, float(sys.argv[2])) for name, dtype in found.items()}), flush=True)


if __name__ == "__main__":
    main()
