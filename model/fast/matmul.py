"""Matmuls as fast as convolutions.

On the CPU torch computes float32 matmuls with its BLAS and convolutions with oneDNN. On AMD processors with
AVX-512 the BLAS (MKL) reaches 215 GFLOP/s and oneDNN 420. So matmuls use oneDNN too, where this torch has it.
"""

import math
from functools import cache

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [M, K] and [K, N], without a gradient.

    In float32 oneDNN's rounding error is up to twice that of a BLAS, which adds up shorter stretches of K.
    """
    if len(a) == 1 and a.device.type == "cpu":
        return _row_matmul(a, b)
    # Rows or columns follow one another without gaps; oneDNN is slow for other matrices.
    dense = b.is_contiguous() or b.t().is_contiguous()
    return _onednn(a, b.t()) if dense and _by_onednn(a) else a @ b


def _by_onednn(a: Tensor) -> bool:
    single = a.device.type == "cpu" and a.dtype == torch.float32
    return single and bool(torch.backends.mkldnn.enabled) and _has_onednn()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.t() of [M, K] and [N, K], by the operator that torch's compiler uses for a linear layer."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


@cache
def _has_onednn() -> bool:
    """Whether this torch has the operator, which is not public, with these arguments."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        return bool(_onednn(one, one) == 1)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _row_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for one row x and a weight or its transpose, in `thread_blocks`."""
    if matrix.stride(0) > 1:  # the weight itself, not its transpose
        blocks = thread_blocks(matrix)
        return torch.bmm(x.unflatten(1, blocks).transpose(0, 1), matrix.unflatten(0, blocks)).sum(0)
    # A matrix times a column is a third faster than a row times a matrix.
    parts = matrix.t().unflatten(0, thread_blocks(matrix.t()))
    return torch.bmm(parts, x.t().expand(len(parts), -1, -1)).view(1, -1)


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad.t() @ x, the gradient of a linear layer's weight: [B, O] and [B, I] -> [O, I]."""
    return torch.outer(grad[0], x[0]) if len(x) == 1 else matmul(grad.t(), x)


def thread_blocks(weight: Tensor) -> tuple[int, int]:
    """Number and size of the blocks of a weight's rows, a block for each thread.

    Adam's pass over all weights gives each thread the same stretch of memory every time. With the same blocks
    in a matmul, a thread reads from its own core's cache. Data that another core has just written can take
    several times as long to read as data in memory.
    """
    number = math.gcd(len(weight), torch.get_num_threads()) if weight.device.type == "cpu" else 1
    return number, len(weight) // number
