"""The kernels that the networks spend their time in.

All give the numbers of the plain formulation up to rounding and take a shorter way there:

* `conv2d`: a convolution and its two adjoints are three bilinear maps, and the derivative of each is
  made of the other two. Written so, the double backward of the inner loop runs on the same fast kernels
  as the forward pass. (torch's own takes slow paths at batch 1.)
* `instance_norm`: its double backward in closed form, a dozen passes where the composed one takes forty.
* `grey_block`: convolution, norm, ReLU and max-pool of a grey image. The norm's statistics follow from
  those of the image's 3x3 patches, and ReLU and the norm commute with max-pool up to the sign of the
  norm's scale: so the full-size activations are never normalised, nor kept.
* `SharedLinear`: a weight that many single examples meet. Their parts of its gradient are outer
  products; it adds them up as one matrix product at the end of the backward pass.

`conv2d` and `grey_block` can be differentiated to any order, `instance_norm` twice, `SharedLinear` once.

Activations are [B, C, H, W] as everywhere, but lie in memory with the channels last, as do the kernels
of `modelfactory`'s networks: a patch is then a few long runs of memory, and whatever treats channels
alike runs along them. Other layouts give the same numbers, slower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.autograd.function import once_differentiable

# Output positions of a batch up to which a convolution on the CPU is a product with a matrix of patches:
# as fast as the convolution kernels at 121 positions, twice as fast at 9, and more accurate.
FEW_POSITIONS = 256
CHUNK = 4  # images whose full-size activations exist at a time, few enough to stay in cache


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
            return F.conv2d(x, weight, stride=stride)
        height, width = _output_size(x, stride)
        rows = _patch_rows(x, stride) @ _last(weight).flatten(1).t()
        return rows.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            _ConvInput.apply(grad, weight, x, ctx.stride) if need_x else None,
            _ConvWeight.apply(x, grad, weight, ctx.stride) if need_weight else None,
            None,
        )


class _ConvInput(torch.autograd.Function):
    """The adjoint with respect to the input, B(y, w), with the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, like: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.stride = stride
        return _native_backward(grad, like, weight, stride, (True, False, False))[0]

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
    """The adjoint with respect to the weight, A(x, y), with the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, like: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.stride = stride
        if not _few_positions(x, stride):
            return _native_backward(grad, x, like, stride, (False, True, False))[1]
        product = _last(grad).flatten(0, 2).t() @ _patch_rows(x, stride)
        return product.view(len(like), 3, 3, -1).permute(0, 3, 1, 2)

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


def _last(x: Tensor) -> Tensor:
    """The channels of [B, C, H, W] last: [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def _output_size(x: Tensor, stride: int) -> tuple[int, int]:
    return (x.shape[2] - 3) // stride + 1, (x.shape[3] - 3) // stride + 1


def _few_positions(x: Tensor, stride: int) -> bool:
    height, width = _output_size(x, stride)
    return x.device.type == "cpu" and len(x) * height * width <= FEW_POSITIONS


def _patch_rows(x: Tensor, stride: int) -> Tensor:
    """The 3x3 patches of [B, C, H, W], one row of length 9 * C for each output position."""
    patches = _last(x).unfold(1, 3, stride).unfold(2, 3, stride)  # [B, H', W', C, 3, 3]
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])


def _native_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's backward of a convolution: gradients of input, weight and bias as `mask` asks."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    return grads


def instance_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Normalise each sample and channel by its own statistics over H x W, then scale and shift.

    Args:
        x: [B, C, H, W].
        scale, shift: [C].
        eps: added to the biased variance.
    """
    rows = _last(x).flatten(1, 2)
    y: Tensor = _Norm.apply(rows, scale, shift, eps)
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class _Norm(torch.autograd.Function):
    """The norm of [B, P, C] over P: with z = (x - mean) * r and r = 1 / std, y = scale * z + shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        z = x - x.mean(1, keepdim=True)
        r = torch.rsqrt((z * z).mean(1, keepdim=True) + eps)
        z *= r
        ctx.save_for_backward(x, scale, z, r)
        return torch.addcmul(shift, z, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, z, r = ctx.saved_tensors
        return *_NormSlope.apply(grad, x, scale, z, r), None


class _NormSlope(torch.autograd.Function):
    """Gradients of x, scale and shift from g, that of y.

    With means over P, these are scale * r * (g - mean(g) - z * mean(g z)), sum(g z) and sum(g). z and r
    are functions of x, of which dz = r * (dx - mean(dx) - z * mean(z dx)) and dr = -r * r * mean(z dx).
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, scale: Tensor, z: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_g, mean_gz = g.mean(1, keepdim=True), (g * z).mean(1, keepdim=True)
        ctx.save_for_backward(g, scale, z, r, mean_g, mean_gz)
        slope = torch.addcmul(mean_g, z, mean_gz)
        torch.sub(g, slope, out=slope).mul_(scale * r)
        return slope, mean_gz.sum((0, 1)) * g.shape[1], mean_g.sum((0, 1)) * g.shape[1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, v: Tensor, p: Tensor, q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of g, x and scale from v, p and q, those of the three results."""
        g, scale, z, r, mean_g, mean_gz = ctx.saved_tensors
        slope = scale * r
        mean_v, mean_vz = v.mean(1, keepdim=True), (v * z).mean(1, keepdim=True)
        overlap = (v * g).mean(1, keepdim=True) - mean_v * mean_g - mean_vz * mean_gz
        to_scale = (r * overlap).sum((0, 1)) * g.shape[1]
        # The gradient of z is a * g + b * v.
        a, b = p - slope * mean_vz, -slope * mean_gz
        to_g = torch.addcmul(q - slope * mean_v, z, a).addcmul_(v, slope)
        mean = a * mean_g + b * mean_v
        along_z = a * mean_gz + b * mean_vz + slope * overlap
        to_x = torch.addcmul(mean, z, along_z).neg_().addcmul_(g, a).addcmul_(v, b).mul_(r)
        return to_g, to_x, to_scale, None, None


def grey_block(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """relu(max_pool2(norm(conv(x)))) of grey images, the norm per sample and channel.

    With u a patch of the image less the mean patch, a channel's normalised value is
    w.u * scale / sqrt(w.Cov.w + eps) + shift, where Cov is the covariance of the image's patches. The
    statistics are formed in float64 where there is one, which costs nothing at this size.

    Args:
        x: [B, 1, H, W] images, H and W even; no gradient flows to them.
        weight: [C, 1, 3, 3].
        scale, shift: [C] of the norm.
        eps: added to the variance.

    Returns:
        [B, C, (H - 2) / 2, (W - 2) / 2]
    """
    patches = _centred_patches(x)
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)  # max-pool of -x is min-pool of x
    kernel = weight.flatten(1) * sign[:, None]
    precise = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    flat, wide = patches.flatten(1, 2).to(precise), kernel.to(precise)
    covariance = flat.transpose(1, 2) @ flat / flat.shape[1]
    variance = ((wide @ covariance) * wide).sum(2)  # [B, C]
    slope = (scale * sign * torch.rsqrt(variance + eps)).to(x.dtype)
    pooled: Tensor = _MaxConv.apply(kernel, patches)
    out = torch.addcmul(shift, pooled, slope[:, None]).relu()
    return out.unflatten(1, ((x.shape[2] - 2) // 2, (x.shape[3] - 2) // 2)).permute(0, 3, 1, 2)


def _centred_patches(x: Tensor) -> Tensor:
    """Patches of [B, 1, H, W] less their mean: [B, 4, P, 9], P pooling windows of 4 positions each."""
    patches = x[:, 0].unfold(1, 3, 1).unfold(2, 3, 1)
    batch, height, width = patches.shape[:3]
    windows = patches.reshape(batch, height // 2, 2, width // 2, 2, 9)
    windows = windows.permute(0, 2, 4, 1, 3, 5).reshape(batch, 4, -1, 9)
    return windows - windows.mean((1, 2), keepdim=True)


class _MaxConv(torch.autograd.Function):
    """max over the 4 positions of a pooling window of patch . kernel: [C, 9], [B, 4, P, 9] -> [B, P, C].

    The derivative is that of the winning position, the first of equals, as in torch's max-pool.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor) -> Tensor:
        pooled, wins = [], []
        for part in patches.split(CHUNK):
            first, second, third, fourth = _responses(kernel, part).unbind(1)
            left, right = torch.maximum(first, second), torch.maximum(third, fourth)
            wins.append(torch.stack([first >= second, third >= fourth, left >= right], 1))
            pooled.append(torch.maximum(left, right))
        ctx.save_for_backward(patches, _joined(wins))
        return _joined(pooled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None


class _Spread(torch.autograd.Function):
    """Gradient of the kernel from that of the winners: [B, P, C] -> [C, 9].

    `wins` [B, 3, P, C] is a knock-out of the four: first over second, third over fourth, and the winner
    of those over the winner of these.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, patches: Tensor, wins: Tensor) -> Tensor:
        ctx.save_for_backward(patches, wins)
        total = grad.new_zeros(9, grad.shape[2])
        for g, part, won in zip(*(t.split(CHUNK) for t in (grad, patches, wins)), strict=True):
            left = g * won[:, 2]
            right = g - left
            first, third = left * won[:, 0], right * won[:, 1]
            spread = torch.stack([first, left - first, third, right - third], 1)
            total.addmm_(part.flatten(0, 2).t(), spread.flatten(0, 2))
        return total.t()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return _Select.apply(v, *ctx.saved_tensors), None, None


class _Select(torch.autograd.Function):
    """What a kernel answers at the winning positions of another one: [C, 9] -> [B, P, C]."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor, wins: Tensor) -> Tensor:
        ctx.save_for_backward(patches, wins)
        chosen = []
        for part, won in zip(patches.split(CHUNK), wins.split(CHUNK), strict=True):
            first, second, third, fourth = _responses(kernel, part).unbind(1)
            left, right = torch.where(won[:, 0], first, second), torch.where(won[:, 1], third, fourth)
            chosen.append(torch.where(won[:, 2], left, right))
        return _joined(chosen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _responses(kernel: Tensor, patches: Tensor) -> Tensor:
    """patch . kernel for every position: [C, 9], [B, 4, P, 9] -> [B, 4, P, C]."""
    return (patches.flatten(0, 2) @ kernel.t()).view(*patches.shape[:3], -1)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, [B, K] and [K, N], as a matrix-vector product where B is 1: a third of the time."""
    return torch.mv(matrix.t(), x[0])[None] if len(x) == 1 else x @ matrix


class SharedLinear:
    """A weight [O, F] to multiply single rows with, forwards and transposed, many times in a graph.

    Multiplying by the tensor itself would give as many gradients of its full size to add up.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.token = _Collect.apply(weight, self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T: [B, F] -> [B, O]."""
        product: Tensor = _Product.apply(x, self.token, self.weight.t(), self.factors, False)
        return product

    def transposed(self, y: Tensor) -> Tensor:
        """y @ weight: [B, O] -> [B, F]."""
        product: Tensor = _Product.apply(y, self.token, self.weight, self.factors, True)
        return product


class _Collect(torch.autograd.Function):
    """Ties the products to the weight: autograd runs it after all of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.factors = factors
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        left, right = (torch.cat(part) for part in zip(*ctx.factors, strict=True))
        ctx.factors.clear()
        return left.t() @ right, None


class _Product(torch.autograd.Function):
    """x @ matrix, which leaves the factors of the weight's gradient, [B, O] and [B, F], in a list."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token: Tensor,
        matrix: Tensor,
        factors: list[tuple[Tensor, Tensor]],
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, token, matrix)
        ctx.factors, ctx.transposed = factors, transposed
        return times(x, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, token, matrix = ctx.saved_tensors
        ctx.factors.append((x, grad) if ctx.transposed else (grad, x))
        return times(grad, matrix.t()), token, None, None, None
