"""Both adjoints of a 3x3 convolution over many images, with a third of the multiplications.

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

from functools import cache

import torch
from torch import Tensor

# Where the polynomials behind the transforms are evaluated, besides infinity, for tiles of 3 and 4: the
# errors depend on it.
POINTS = {3: (0, 1, -1, 2), 4: (0, 0.75, -0.75, 1.5, -1.5)}
CHUNK = 400  # tiles that are treated at a time: few enough to stay in cache, enough for long products


def adjoints(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and kernel from that of its output.

    Args:
        grad: [B, O, H - 2, W - 2]
        x: [B, I, H, W]
        weight: [O, I, 3, 3]
        need_x, need_weight: which of the two to compute.

    Returns:
        [B, I, H, W] and [O, I, 3, 3], channels last; empty what was not asked for.
    """
    (batch, outputs, height, width), inputs = grad.shape, x.shape[1]
    tile = min(4, max(3, height, width))
    across, down = -(-width // tile), -(-height // tile)
    of_output, of_kernel, of_input = (matrix.to(x) for matrix in transforms(tile))
    patch = tile + 2
    kernel = (of_kernel @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(-1, outputs, inputs)
    to_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    total = torch.zeros_like(kernel)
    images = max(1, CHUNK // (across * down))
    for start in range(0, batch, images):
        part = slice(start, start + images)
        count = len(grad[part])
        rows = grad.new_zeros(count, down * tile, across * tile, outputs)
        rows[:, :height, :width] = grad[part].permute(0, 2, 3, 1)
        tiles = rows.view(count, down, tile, across, tile, outputs).permute(2, 4, 0, 1, 3, 5)
        errors = (of_output @ tiles.reshape(tile * tile, -1)).view(patch * patch, -1, outputs)
        if need_weight:
            rows = x.new_zeros(count, down * tile + 2, across * tile + 2, inputs)
            rows[:, : height + 2, : width + 2] = x[part].permute(0, 2, 3, 1)
            patches = rows.unfold(1, patch, tile).unfold(2, patch, tile).permute(4, 5, 0, 1, 2, 3)
            seen = (of_input.t() @ patches.reshape(patch * patch, -1)).view(patch * patch, -1, inputs)
            total.baddbmm_(errors.transpose(1, 2), seen)
        if need_x:
            back = of_input @ (errors @ kernel).view(patch * patch, -1)
            back = back.view(patch, patch, count, down, across, inputs)
            rows = x.new_zeros(count, down * tile + 2, across * tile + 2, inputs)
            for i in range(patch):
                for j in range(patch):
                    rows[:, i : i + down * tile : tile, j : j + across * tile : tile] += back[i, j]
            to_x[part] = rows[:, : height + 2, : width + 2].permute(0, 3, 1, 2)
    if not need_weight:
        return to_x, x.new_empty(0)
    to_weight = (of_kernel.t() @ total.view(len(total), -1)).view(3, 3, outputs, inputs)
    return to_x, to_weight.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


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
