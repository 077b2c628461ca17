"""Matrix products as fast as convolutions, and those of a linear layer.

On the CPU torch gives products in float32 to its BLAS and convolutions to oneDNN. On some processors the
first leaves half of the vector units idle: MKL, on AMD's with AVX-512, reaches 215 GFLOP/s where oneDNN
reaches 420. So products go to oneDNN too, where this torch has it.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [M, K] and [K, N]. No gradient flows through it.

    In float32 oneDNN errs by up to twice as much as a BLAS, which adds up shorter stretches of K.
    """
    if len(a) == 1 and a.device.type == "cpu":
        return _row_matmul(a, b)
    return _onednn(a, b.t()) if _by_onednn(a) and _dense(b) else a @ b


def _by_onednn(a: Tensor) -> bool:
    single = a.device.type == "cpu" and a.dtype == torch.float32
    return single and bool(torch.backends.mkldnn.enabled) and _has_onednn()


def _dense(matrix: Tensor) -> bool:
    """Whether rows or columns follow one another without gaps. For others oneDNN has slow code only."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """What torch's compiler makes of a linear layer: [M, K] and [N, K]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


@cache
def _has_onednn() -> bool:
    """Whether this torch knows the operator, which has no public name, and takes these arguments."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        return bool(_onednn(one, one) == 1)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _row_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for a single row and a matrix that is a weight or its transpose, in `thread_blocks`."""
    if matrix.stride(0) > 1:  # the weight itself, not its transpose
        blocks = thread_blocks(matrix)
        return torch.bmm(x.unflatten(1, blocks).transpose(0, 1), matrix.unflatten(0, blocks)).sum(0)
    # As matrix times column, a third faster than as row times matrix.
    parts = matrix.t().unflatten(0, thread_blocks(matrix.t()))
    return torch.bmm(parts, x.t().expand(len(parts), -1, -1)).view(1, -1)


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad.t() @ x, the gradient of a linear layer's weight: [B, O] and [B, I] -> [O, I]."""
    return torch.outer(grad[0], x[0]) if len(x) == 1 else matmul(grad.t(), x)


def thread_blocks(weight: Tensor) -> tuple[int, int]:
    """How the threads divide the rows of a weight: number and size of their blocks.

    A pass over all weights, as Adam's, gives each thread the same stretch of memory every time. Where
    products keep to that, a thread finds what it has written in its own cache. Cores need not share one
    (those of some processors do in groups): what another has just written then takes several times as
    long to read as what lies in memory.
    """
    number = math.gcd(len(weight), torch.get_num_threads()) if weight.device.type == "cpu" else 1
    return number, len(weight) // number
