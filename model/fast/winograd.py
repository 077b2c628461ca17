"""Gradients of input and kernel of a 3x3 convolution over many images, with a third of the multiplications.

Winograd's minimal filtering (Lavin and Gray, *Fast algorithms for convolutional neural networks*, 2016)
computes a tile of m x m outputs from a patch d of n x n inputs, n = m + 2, as

    A' [(G w G') * (B' d B)] A        (' transposed, * element by element)

with n * n multiplications per pair of channels instead of 9 * m * m. The result is linear in w and d, so the
gradients are the transposed maps around the same products. With E = A grad A', the gradient of w is
G' [sum over tiles of E * (B' d B)] G, and of d B [(G w G') * E] B', added up where patches overlap.

In float32 the relative error is about 1e-6, which gradients tolerate. The forward convolution is direct: its
rounding error decides which pixels pass ReLU and max-pool.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.fast.matmul import matmul

TILE = 4  # m
# Where the polynomials behind the transforms are evaluated, besides infinity, which decides rounding errors.
POINTS = (0, 0.75, -0.75, 1.5, -1.5)
CHUNK = 760  # tiles that are transformed at a time: few for the memory, many for long matmuls


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and kernel from the gradient of its output.

    Args:
        grad: [B, H - 2, W - 2, O]
        x: [B, H, W, I]
        weight: [O, I, 3, 3]
        need_x, need_weight: which of the two to compute.

    Returns:
        [B, H, W, I] and [O, I, 3, 3], the latter channels last in memory; an empty tensor where not needed.
    """
    outputs, inputs = weight.shape[:2]
    grid = -(-grad.shape[1] // TILE), -(-grad.shape[2] // TILE)
    a, g, b = (matrix.to(x) for matrix in transforms())
    kernel_tile = _map(g, weight.permute(2, 3, 0, 1).reshape(9, outputs, inputs))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    total = torch.zeros_like(kernel_tile)
    images = max(1, CHUNK // math.prod(grid))
    for start in range(0, len(x), images):
        part = slice(start, start + images)
        grad_tiles = _map(a, _patches(grad[part], grid, TILE))
        if need_weight:
            x_tiles = _map(b.t(), _patches(x[part], grid, TILE + 2))
            grad_tiles_t = grad_tiles.transpose(1, 2).contiguous()
            for sum_, *factors in zip(total, grad_tiles_t, x_tiles, strict=True):
                sum_ += matmul(*factors)
            del x_tiles, grad_tiles_t  # each is as large as all activations of the chunk
        if need_x:
            products = torch.stack([matmul(*pair) for pair in zip(grad_tiles, kernel_tile, strict=True)])
            patches = _map(b, products).view(TILE + 2, TILE + 2, -1, *grid, inputs)
            rows = add_up(patches.permute(2, 3, 4, 0, 1, 5), TILE, (grid[0] * TILE + 2, grid[1] * TILE + 2))
            grad_x[part] = rows[:, : x.shape[1], : x.shape[2]]
    if not need_weight:
        return grad_x, x.new_empty(0)
    grad_weight = _map(g.t(), total).view(3, 3, outputs, inputs)
    return grad_x, grad_weight.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def _map(matrix: Tensor, patches: Tensor) -> Tensor:
    """`matrix` times every patch, channel by channel: [n, m] and [m, N, C] -> [n, N, C]."""
    return matmul(matrix, patches.flatten(1)).view(-1, *patches.shape[1:])


def _patches(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Patches of side x side pixels, one for each tile of the grid, zero beyond the edge.

    [B, H, W, C] -> [side * side, N, C]
    """
    height, width = (count * TILE + side - TILE for count in grid)
    rows = x.new_zeros(len(x), height, width, x.shape[3])
    rows[:, : x.shape[1], : x.shape[2]] = x
    patches = rows.unfold(1, side, TILE).unfold(2, side, TILE)  # [B, *grid, C, side, side]
    return patches.permute(4, 5, 0, 1, 2, 3).reshape(side * side, -1, x.shape[3])


def add_up(patches: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Patches `stride` apart, added up where they overlap: [B, H', W', n, n, C] -> [B, *size, C].

    The CPU adds within each line of patches first, then lines: 2 n additions in place of n * n.
    """
    batch, down, across, side, _, channels = patches.shape
    if patches.device.type != "cpu":  # one kernel in place of many
        columns = patches.permute(0, 5, 3, 4, 1, 2).reshape(batch, -1, down * across)
        return F.fold(columns, size, side, stride=stride).permute(0, 2, 3, 1)
    lines = patches.new_zeros(batch, down, size[1], side, channels)
    for j, part in enumerate(patches.unbind(4)):
        lines[:, :, j : j + stride * across : stride] += part
    x = patches.new_zeros(batch, *size, channels)
    for i, part in enumerate(lines.unbind(3)):
        x[:, i : i + stride * down : stride] += part
    return x


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Two-dimensional A, G and B in float64: [n * n, m * m], [n * n, 9] and [n * n, n * n] with n = m + 2,
    for patches flattened row by row.

    A product of polynomials is the inverse of evaluation, applied to the product of the polynomials' values
    (Toom and Cook). A convolution is the transposed map.
    """
    points = torch.tensor(POINTS, dtype=torch.float64)

    def values(coefficients: int) -> Tensor:
        """[n, k], which evaluates a polynomial of k coefficients at all points, infinity last."""
        infinity = torch.zeros(1, coefficients, dtype=torch.float64)
        infinity[0, -1] = 1
        return torch.cat([points[:, None] ** torch.arange(coefficients), infinity])

    matrices = values(TILE), values(3), torch.linalg.inv(values(TILE + 2))
    a, g, b = (torch.kron(matrix, matrix) for matrix in matrices)
    return a, g, b
