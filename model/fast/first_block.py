"""The first block on grey images: convolution, norm, ReLU and max-pool without full-size activations.

The norm's statistics follow from those of the image's 3x3 patches: so it is the kernel that is
normalised, nine values a channel. Differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.fast.conv import channels_last, to_image

CHUNK = 4  # images whose full-size activations exist at a time, few enough to stay in cache


def grey_block(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """relu(max_pool2(norm(conv(x)))) of grey images, the norm per sample and channel.

    With u a patch of the image less the mean patch, a channel's normalised value is v.u + shift with
    v = w * scale / sqrt(w.Cov.w + eps), where Cov is the covariance of the image's patches: a kernel for
    each image. What is that small is formed in float64 where there is one, which costs nothing.

    Args:
        x: [B, 1, H, W] images, H and W even; no gradient flows to them.
        weight: [C, 1, 3, 3].
        scale, shift: [C] of the norm.
        eps: added to the variance.

    Returns:
        [B, C, (H - 2) / 2, (W - 2) / 2]
    """
    patches = centred_patches(x)
    precise = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    flat = patches.flatten(1, 2).to(precise)
    covariance = flat.transpose(1, 2) @ flat / flat.shape[1]
    wide = weight.flatten(1).to(precise)
    variance = ((wide @ covariance) * wide).sum(2)  # [B, C]
    kernel = (wide * (scale * (variance + eps).rsqrt())[:, :, None]).to(weight.dtype)
    kernel = torch.cat([kernel, shift.expand(len(x), -1)[:, :, None]], 2)
    y: Tensor = _MaxConv.apply(kernel, F.pad(patches, (0, 1), value=1))  # the shift's input is 1
    return y


def centred_patches(x: Tensor) -> Tensor:
    """The 3x3 patches of grey images less their mean: [B, 1, H, W] -> [B, H - 2, W - 2, 9]"""
    patches = x[:, 0].unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    return patches - patches.mean((1, 2), keepdim=True)


class _MaxConv(torch.autograd.Function):
    """relu(max k.u) over windows of 2 x 2 positions: [B, C, K] and [B, H, W, K] -> [B, C, H / 2, W / 2].

    Each image's patches u meet a kernel k of its own. The derivative is that of the winning position, the
    first of equals.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor) -> Tensor:
        batch, height, width, _ = patches.shape
        rows = patches.new_empty(batch * height * width // 4, kernel.shape[1])
        y = to_image(rows, height // 2, width // 2)
        # Max-pool's own int64 takes four times the memory.
        winners = torch.empty_like(y, dtype=torch.int16 if height * width < 2**15 else torch.int32)
        for *parts, best, won in _chunks(kernel, patches, y, winners):
            values, places = torch.ops.aten.max_pool2d_with_indices(_responses(*parts), [2, 2], [2, 2])
            torch.clamp_min(values, 0, out=best)
            won.copy_(places)
        ctx.save_for_backward(patches, winners, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None


class _Spread(torch.autograd.Function):
    """Gradient of the kernels from that of their responses y: [B, C, H / 2, W / 2] -> [B, C, K]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, patches: Tensor, winners: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(patches, winners, y)
        grads = []
        for g, part, won, response in _chunks(grad, patches, winners, y):
            passed = torch.ops.aten.threshold_backward(g, response, 0)
            like = g.new_empty(*part.shape[:3], g.shape[1]).permute(0, 3, 1, 2)
            spread = torch.ops.aten.max_pool2d_with_indices_backward(
                passed, like, [2, 2], [2, 2], [0, 0], [1, 1], False, won.long()
            )
            grads.append(part.flatten(1, 2).transpose(1, 2) @ channels_last(spread).flatten(1, 2))
        return torch.cat(grads).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        return _Select.apply(v, *ctx.saved_tensors), None, None, None


class _Select(torch.autograd.Function):
    """Responses of other kernels where those of y won: [B, C, K] -> [B, C, H / 2, W / 2]."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor, winners: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(patches, winners, y)
        chosen = [
            channels_last(_responses(*parts)).flatten(1, 2).gather(1, channels_last(won).flatten(1, 2).long())
            for *parts, won in _chunks(kernel, patches, winners)
        ]
        responses = to_image(torch.cat(chosen), *y.shape[2:])
        passed: Tensor = torch.ops.aten.threshold_backward(responses, y, 0)
        return passed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`CHUNK` images of each at a time, on other devices than the CPU all."""
    first = tensors[0]
    size = CHUNK if first.device.type == "cpu" else len(first)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _responses(kernel: Tensor, patches: Tensor) -> Tensor:
    """k.u for every position: [B, C, K], [B, H, W, K] -> [B, C, H, W]."""
    return to_image(patches.flatten(1, 2) @ kernel.transpose(1, 2), *patches.shape[1:3])
