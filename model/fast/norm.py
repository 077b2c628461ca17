"""Per-image norm with its double backward in closed form: a dozen passes where the composed one takes
forty."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fast.conv import channels_last, to_image


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> Tensor:
    """ReLU of the norm of each image and channel over H x W, max-pooled by 2 where asked.

    Differentiable twice.

    Args:
        x: [B, C, H, W].
        weight, bias: [C] scale and shift.
        eps: added to the biased variance.
        pool: [B, C, H, W] -> [B, C, H // 2, W // 2].
    """
    sign = torch.ones_like(weight).copysign(weight.detach())
    z: Tensor = _Norm.apply(channels_last(x).flatten(1, 2), sign, eps)
    x = to_image(z, x.shape[2], x.shape[3])
    # First of all: the rest on a quarter of it. That scale and shift may come after, the norm has the
    # scale's sign: where that is negative, the largest of the results is that of the smallest value.
    x = F.max_pool2d(x, 2) if pool else x
    scale = weight * sign
    return torch.addcmul(bias[:, None, None], x, scale[:, None, None]).relu_()


class _Norm(torch.autograd.Function):
    """The norm of [B, P, C] over P: z = (x - mean) * r with r = sign / std."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: Tensor, eps: float) -> Tensor:
        z, r = norm(x, sign, eps)
        ctx.save_for_backward(x, z, r)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _NormInput.apply(grad, *ctx.saved_tensors), None, None


class _NormInput(torch.autograd.Function):
    """See `norm_backward`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, z: Tensor, r: Tensor) -> Tensor:
        to_x, *means = norm_backward(g, z, r)
        ctx.save_for_backward(g, z, r, *means)
        return to_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *norm_double_backward(v, *ctx.saved_tensors), None, None


def norm(x: Tensor, sign: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm z = (x - mean) * r of [..., P, C] over P, and r = sign / std, [..., 1, C]."""
    z = x - x.mean(-2, keepdim=True)
    r = torch.rsqrt((z * z).mean(-2, keepdim=True) + eps) * sign
    return z.mul_(r), r


def norm_backward(g: Tensor, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_input from g, the gradient of z: with means over P, r * (g - mean(g) - z * mean(g z)); and these
    two means."""
    mean_g, mean_gz = g.mean(-2, keepdim=True), (g * z).mean(-2, keepdim=True)
    to_x = torch.addcmul(mean_g, z, mean_gz)
    return torch.sub(g, to_x, out=to_x).mul_(r), mean_g, mean_gz


def norm_double_backward(
    v: Tensor, g: Tensor, z: Tensor, r: Tensor, mean_g: Tensor, mean_gz: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of g and x from v, that of `norm_backward`'s result.

    z and r are functions of x, of which dz = r * (dx - mean(dx) - z * mean(z dx)) and
    dr = -r * r * mean(z dx).
    """
    to_g, mean_v, mean_vz = norm_backward(v, z, r)
    along_z = (v * g).mean(-2, keepdim=True) - mean_v * mean_g - 3 * mean_vz * mean_gz
    mean = mean_vz * mean_g + mean_gz * mean_v
    to_x = torch.addcmul(-mean, z, along_z).addcmul_(g, mean_vz).addcmul_(v, mean_gz).mul_(-r * r)
    return to_g, to_x
