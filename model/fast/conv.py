"""3x3 convolutions without padding: forward, grad_input and grad_weight, each differentiable to any order.

A convolution F(x, w), its grad_input B(g, w) and its grad_weight A(x, g) are three bilinear maps, and the
derivative of each is made of the other two. Written so, the double backward of the inner loop runs on the
same fast code as the forward pass. (torch's own takes slow paths at batch 1.) Over few output positions
they are products with a matrix of patches (im2col), over many the gradients are those of `winograd`.

Activations are [B, C, H, W] as everywhere, but lie in memory with the channels last, as do the kernels of
`model.fast`'s layers: a patch is then a few long runs of memory, and whatever treats channels alike runs
along them. Other layouts give the same numbers, slower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.fast import winograd
from model.fast.matmul import matmul
from model.fast.winograd import add_up

# Output positions of a batch up to which a convolution is a matmul with patches, faster than torch's
# convolution.
FEW_POSITIONS = 256
MANY_CHANNELS = 128  # from which on `winograd`'s transforms cost less than its products save


def conv2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """3x3 convolution without padding or bias: [B, I, H, W] and [O, I, 3, 3] -> [B, O, H', W']."""
    y: Tensor = _Conv.apply(x, weight, stride)
    return y


class _Conv(torch.autograd.Function):
    """y = F(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        if not _few_positions(x, stride):
            # The CPU's channels-last kernel adds up 9 * I products one after the other, the other one in
            # blocks: a third of the rounding error, and with it of the decisions of ReLU and max-pool
            # that float32 gets wrong.
            y = F.conv2d(x.contiguous(), weight.contiguous(), stride=stride)
            return y.contiguous(memory_format=torch.channels_last)
        return to_image(matmul(_im2col(x, stride), kernel_rows(weight).t()), *_output_size(x, stride))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        if _many(x, weight, ctx.stride) and need_x and need_weight and not torch.is_grad_enabled():
            return *winograd.gradients(grad, x, weight), None  # less work than one by one
        return (
            _ConvInput.apply(grad, weight, x, ctx.stride) if need_x else None,
            _ConvWeight.apply(x, grad, weight, ctx.stride) if need_weight else None,
            None,
        )


class _ConvInput(torch.autograd.Function):
    """grad_input B(grad, w), with the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, like: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.stride = stride
        return _gradients(grad, like, weight, stride, need_weight=False)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad, weight = ctx.saved_tensors
        need_grad, need_weight, *_ = ctx.needs_input_grad
        return (
            conv2d(v, weight, ctx.stride) if need_grad else None,
            _ConvWeight.apply(v, grad, weight, ctx.stride) if need_weight else None,
            None,
            None,
        )


class _ConvWeight(torch.autograd.Function):
    """grad_weight A(x, grad), with the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, like: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.stride = stride
        if not _few_positions(x, stride):
            return _gradients(grad, x, like, stride, need_x=False)[1]
        return kernel_of_rows(matmul(channels_last(grad).flatten(0, 2).t(), _im2col(x, stride)))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, grad = ctx.saved_tensors
        need_x, need_grad, *_ = ctx.needs_input_grad
        return (
            _ConvInput.apply(grad, v, x, ctx.stride) if need_x else None,
            conv2d(x, v, ctx.stride) if need_grad else None,
            None,
            None,
        )


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], a view."""
    return x.permute(0, 2, 3, 1)


def to_image(rows: Tensor, height: int, width: int) -> Tensor:
    """Rows of channels, [B * H * W, C], as [B, C, H, W], a view."""
    return rows.view(-1, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


def kernel_rows(weight: Tensor) -> Tensor:
    """A kernel [O, I, 3, 3] as the matrix [O, 9 * I] that multiplies patches, a view of it."""
    return channels_last(weight).flatten(1)


def kernel_of_rows(rows: Tensor) -> Tensor:
    """The inverse of `kernel_rows`."""
    return to_image(rows.view(len(rows), 9, -1), 3, 3)


def _output_size(x: Tensor, stride: int) -> tuple[int, int]:
    return (x.shape[2] - 3) // stride + 1, (x.shape[3] - 3) // stride + 1


def _few_positions(x: Tensor, stride: int) -> bool:
    height, width = _output_size(x, stride)
    return len(x) * height * width <= FEW_POSITIONS


def _many(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether there is enough of everything for `winograd`."""
    many = x.device.type == "cpu" and not _few_positions(x, stride)
    return many and stride == 1 and min(weight.shape[:2]) >= MANY_CHANNELS


def _im2col(x: Tensor, stride: int) -> Tensor:
    """The 3x3 patches of [B, C, H, W], one row of length 9 * C for each output position."""
    patches = channels_last(x).unfold(1, 3, stride).unfold(2, 3, stride)  # [B, H', W', C, 3, 3]
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and kernel; without meaning where not needed."""
    if _many(x, weight, stride):
        return winograd.gradients(grad, x, weight, need_x, need_weight)
    if not need_weight and _few_positions(x, stride):
        patches = matmul(channels_last(grad).flatten(0, 2), kernel_rows(weight))
        patches = patches.view(len(x), *_output_size(x, stride), 3, 3, -1)
        to_x = add_up(patches, stride, (x.shape[2], x.shape[3]))
        return to_x.permute(0, 3, 1, 2), x.new_empty(0)
    needed = (need_x, need_weight, False)
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, needed
    )
    return to_x, to_weight
