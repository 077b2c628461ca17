"""Matrix products, as fast as convolutions.

On the CPU torch gives products in float32 to its BLAS and convolutions to oneDNN. On some processors the
first leaves half of the vector units idle: MKL, on AMD's with AVX-512, reaches 215 GFLOP/s where oneDNN
reaches 420. So products go to oneDNN too, where this torch has it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a @ b, or a @ b + plus, of [M, K], [K, N] and [M, N]. No gradient flows through it.

    In float32 oneDNN errs by up to twice as much as a BLAS, which adds up shorter stretches of K.
    """
    if not (_by_onednn(a) and _dense(b)):
        return a @ b if plus is None else torch.addmm(plus, a, b)
    return _linear(a, b.t(), plus)


def _by_onednn(a: Tensor) -> bool:
    single = a.device.type == "cpu" and a.dtype == torch.float32
    return single and bool(torch.backends.mkldnn.enabled) and _has_linear()


def _dense(matrix: Tensor) -> bool:
    """Whether rows or columns follow one another without gaps. For others oneDNN has slow code only."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _linear(x: Tensor, weight: Tensor, plus: Tensor | None) -> Tensor:
    """What torch's compiler makes of a linear layer, and of a sum that follows: [M, K] and [N, K]."""
    linear = torch.ops.mkldnn._linear_pointwise
    result: Tensor
    if plus is None:
        result = linear(x, weight, None, "none", [], "")
    else:
        result = linear.binary(x, plus, weight, None, "add")
    return result


@cache
def _has_linear() -> bool:
    """Whether this torch knows the operators, which have no public name, and takes these arguments."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        return bool(_linear(one, one, None) == 1 and _linear(one, one, one) == 2)
    except (AttributeError, RuntimeError, TypeError):
        return False
