"""Gradients of input and kernel of a 3x3 convolution over many images, with a third of the multiplications.

Winograd's minimal filtering (Lavin and Gray, *Fast algorithms for convolutional neural networks*, 2016)
computes a tile of m x m outputs from a patch d of n x n inputs, n = m + 2, as

    A' [(G w G') * (B' d B)] A        (' transposed, * element by element)

with n * n multiplications per pair of channels instead of 9 * m * m. It is linear in w and in d, so the
gradients of both are the transposed maps around the same products: with E = A grad A', those are
G' [sum over tiles of E * (B' d B)] G and B [(G w G') * E] B', the latter added up where patches overlap.

In float32 the results err by about 1e-6 of their size. Gradients take that as it is; the convolution
itself stays the direct one, since its rounding decides what ReLU and max-pool let through.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.fast.matmul import matmul

# Where the polynomials behind the transforms are evaluated, besides infinity, for tiles of 3 and 4: the
# errors depend on it.
POINTS = {3: (0, 1, -1, 2), 4: (0, 0.75, -0.75, 1.5, -1.5)}
CHUNK = 760  # tiles that are treated at a time: few enough to take little memory, enough for long products


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and kernel from that of its output.

    Args:
        grad: [B, H - 2, W - 2, O]
        x: [B, H, W, I]
        weight: [O, I, 3, 3]
        need_x, need_weight: which of the two to compute.

    Returns:
        [B, H, W, I] and [O, I, 3, 3], the latter channels last in memory; empty what was not asked for.
    """
    outputs, inputs = weight.shape[:2]
    tile = min(4, max(3, *grad.shape[1:3]))
    grid = -(-grad.shape[1] // tile), -(-grad.shape[2] // tile)
    of_output, of_kernel, of_input = (matrix.to(x) for matrix in transforms(tile))
    kernel = _map(of_kernel, weight.permute(2, 3, 0, 1).reshape(9, outputs, inputs))
    to_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    total = torch.zeros_like(kernel)
    images = max(1, CHUNK // math.prod(grid))
    for start in range(0, len(x), images):
        part = slice(start, start + images)
        errors = _map(of_output, _patches(grad[part], grid, tile, tile))
        if need_weight:
            seen = _map(of_input.t(), _patches(x[part], grid, tile, tile + 2))
            turned = errors.transpose(1, 2).contiguous()
            for sum_, *factors in zip(total, turned, seen, strict=True):
                sum_ += matmul(*factors)
            del seen, turned  # every one of these is as large as all activations of the chunk
        if need_x:
            products = torch.stack([matmul(*factors) for factors in zip(errors, kernel, strict=True)])
            patches = _map(of_input, products).view(tile + 2, tile + 2, -1, *grid, inputs)
            rows = add_up(patches.permute(2, 3, 4, 0, 1, 5), tile, tuple(n * tile + 2 for n in grid))
            to_x[part] = rows[:, : x.shape[1], : x.shape[2]]
    if not need_weight:
        return to_x, x.new_empty(0)
    to_weight = _map(of_kernel.t(), total).view(3, 3, outputs, inputs)
    return to_x, to_weight.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def _map(matrix: Tensor, patches: Tensor) -> Tensor:
    """A transform of every patch, channel by channel: [n, m] and [m, N, C] -> [n, N, C]."""
    return matmul(matrix, patches.flatten(1)).view(-1, *patches.shape[1:])


def _patches(x: Tensor, grid: tuple[int, int], tile: int, side: int) -> Tensor:
    """Patches of side x side pixels, one for each tile of the grid, zero beyond the edge.

    [B, H, W, C] -> [side * side, N, C]
    """
    height, width = (count * tile + side - tile for count in grid)
    rows = x.new_zeros(len(x), height, width, x.shape[3])
    rows[:, : x.shape[1], : x.shape[2]] = x
    patches = rows.unfold(1, side, tile).unfold(2, side, tile)  # [B, *grid, C, side, side]
    return patches.permute(4, 5, 0, 1, 2, 3).reshape(side * side, -1, x.shape[3])


def add_up(patches: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Patches `stride` apart, added up where they overlap: [B, H', W', n, n, C] -> [B, *size, C].

    On the CPU first within each line of patches, then lines: 2 n additions in place of n * n.
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
def transforms(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two-dimensional A, G and B of a tile's size m in float64: [n * n, m * m], [n * n, 9] and
    [n * n, n * n] with n = m + 2, for images whose rows follow one another.

    A product of polynomials is the inverse of evaluation, applied to the product of their values
    (Toom and Cook); a convolution is the transposed map.
    """
    points = torch.tensor(POINTS[tile], dtype=torch.float64)

    def values(coefficients: int) -> Tensor:
        """[n, k]: evaluates a polynomial of k coefficients at all points, the last one infinity."""
        infinity = torch.zeros(1, coefficients, dtype=torch.float64)
        infinity[0, -1] = 1
        return torch.cat([points[:, None] ** torch.arange(coefficients), infinity])

    matrices = values(tile), values(3), torch.linalg.inv(values(tile + 2))
    a, g, b = (torch.kron(matrix, matrix) for matrix in matrices)
    return a, g, b
