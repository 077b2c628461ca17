"""3x3 convolutions without padding and their gradients, for activations [B, H, W, C].

Over few output positions a convolution is a matmul with the matrix of its patches (im2col). Over many the
forward pass is torch's convolution, and the gradients are those of `winograd` where that pays. No gradient
flows through any function here.

Kernels are [O, I, 3, 3] as everywhere, and lie in memory with the channels last, so that the matrix that
multiplies patches is a view of the kernel. Other layouts give the same numbers, slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.fast import winograd
from model.fast.matmul import matmul

# Output positions of a batch up to which a matmul with patches is faster than torch's convolution.
FEW_POSITIONS = 256
MANY_CHANNELS = 128  # below this number the transforms of `winograd` cost more than its products save


def output_size(x: Tensor, stride: int) -> tuple[int, int]:
    """H' and W' of the convolution of [B, H, W, C]."""
    return (x.shape[1] - 3) // stride + 1, (x.shape[2] - 3) // stride + 1


def few_positions(x: Tensor, stride: int) -> bool:
    """Whether the convolution of `x` is computed with `im2col`."""
    height, width = output_size(x, stride)
    return len(x) * height * width <= FEW_POSITIONS


def im2col(x: Tensor, stride: int) -> Tensor:
    """The 3x3 patches of [B, H, W, C] as rows, [B * H' * W', 9 * C]; each copies three runs of memory."""
    x = x.contiguous()
    batch, _, width, channels = x.shape
    shape = (batch, *output_size(x, stride), 3, 3 * channels)
    image, row, pixel, _ = x.stride()
    runs = x.as_strided(shape, (image, stride * row, stride * pixel, width * channels, 1), x.storage_offset())
    return runs.reshape(-1, 9 * channels)


def convolve(x: Tensor, weight: Tensor, stride: int, patches: Tensor | None) -> Tensor:
    """[B, H, W, I] -> [B, H', W', O]; `patches` is `im2col` of `x`, or None over many positions."""
    if patches is not None:
        return matmul(patches, _rows(weight).t()).view(len(x), *output_size(x, stride), len(weight))
    # The CPU's channels-last kernel adds up 9 * I products one after the other, the other one in blocks.
    # Blocks have a third of the rounding error, and with it of the decisions of ReLU and max-pool that
    # float32 gets wrong.
    y = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight.contiguous(), stride=stride)
    return y.permute(0, 2, 3, 1).contiguous()


def grad_input(terms: Sequence[tuple[Tensor, Tensor]], x: Tensor, stride: int) -> Tensor:
    """The sum of the input's gradients, of the shape of `x`, over pairs of output gradient and kernel."""
    if few_positions(x, stride):
        first, *others = (matmul(grad.flatten(0, 2), _rows(weight)) for grad, weight in terms)
        for other in others:
            first += other
        patches = first.view(len(x), *output_size(x, stride), 3, 3, -1)
        return winograd.add_up(patches, stride, (x.shape[1], x.shape[2]))
    return torch.stack([_gradients(grad, x, weight, stride, True, False)[0] for grad, weight in terms]).sum(0)


def grad_weight(terms: Sequence[tuple[Tensor, Tensor, Tensor | None]], weight: Tensor, stride: int) -> Tensor:
    """The sum of the kernel's gradients over triples of output gradient, input and patches of the input."""
    total: Tensor | None = None
    for grad, x, patches in terms:
        if patches is not None:
            grad = matmul(grad.flatten(0, 2).t(), patches).view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        else:
            grad = _gradients(grad, x, weight, stride, False, True)[1]
        total = grad if total is None else total.add_(grad)
    assert total is not None
    return total


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, patches: Tensor | None, need_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the input, where needed, and of the kernel."""
    if patches is None and need_x:
        return _gradients(grad, x, weight, stride, True, True)  # less work together than one by one
    to_x = grad_input([(grad, weight)], x, stride) if need_x else None
    return to_x, grad_weight([(grad, x, patches)], weight, stride)


def _rows(weight: Tensor) -> Tensor:
    """A kernel [O, I, 3, 3] as the matrix [O, 9 * I] that multiplies patches."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of input and kernel over many positions; empty where not needed."""
    if x.device.type == "cpu" and stride == 1 and min(weight.shape[:2]) >= MANY_CHANNELS:
        return winograd.gradients(grad, x, weight, need_x, need_weight)
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        *(grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None),
        *([stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, (need_x, need_weight, False)),
    )
    return to_x.permute(0, 2, 3, 1) if need_x else x.new_empty(0), to_weight
