"""The kernels that the networks spend their time in.

Both give the numbers of the plain formulation up to rounding and take a shorter way there:

* `conv2d`: a convolution and its two adjoints are three bilinear maps, and the derivative of each is
  made of the other two. Written so, the double backward of the inner loop runs on the same fast kernels
  as the forward pass. (torch's own takes slow paths at batch 1.)
* `grey_block`: convolution, norm, ReLU and max-pool of a grey image. The norm's statistics follow from
  those of the image's 3x3 patches, and ReLU and the norm commute with max-pool up to the sign of the
  norm's scale: so the full-size activations are never normalised, nor kept.
* `SharedLinear`: a weight that many single examples meet. Their parts of its gradient are outer
  products; it adds them up as one matrix product at the end of the backward pass.

The first two can be differentiated to any order, the last one once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.autograd.function import once_differentiable

# Output positions of a batch up to which convolutions on the CPU are matrix products of patches. The
# adjoints are then faster (9 positions at batch 1); the forward pass is as fast, and more accurate.
FEW_POSITIONS = 16
FEW_POSITIONS_FORWARD = 256
CHANNELS_AT_A_TIME = 64  # input channels that a convolution on the CPU sums up in one go
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
        if _few_positions(x, stride, FEW_POSITIONS_FORWARD):
            rows = _patch_rows(x, stride) @ weight.flatten(1).t()
            height, width = _output_size(x, stride)
            return rows.view(len(x), height, width, -1).permute(0, 3, 1, 2)
        if x.device.type != "cpu":
            return F.conv2d(x, weight, stride=stride)
        # The CPU kernel adds 9 * I products one after the other. In parts, half of the rounding error
        # is gone, and with it most of the decisions of ReLU and max-pool that float32 gets wrong.
        pieces = zip(x.split(CHANNELS_AT_A_TIME, 1), weight.split(CHANNELS_AT_A_TIME, 1), strict=True)
        first, *others = (F.conv2d(part, kernel, stride=stride) for part, kernel in pieces)
        for other in others:
            first += other
        return first

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
        if _few_positions(like, stride):
            patches = grad.flatten(2).transpose(1, 2) @ weight.flatten(1)
            return F.fold(patches.transpose(1, 2), like.shape[2:], kernel_size=3, stride=stride)
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
        if _few_positions(x, stride):
            rows = grad.permute(1, 0, 2, 3).flatten(1)
            return (rows @ _patch_rows(x, stride)).view_as(like)
        return _native_backward(grad, x, like, stride, (False, True, False))[1]

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


def _output_size(x: Tensor, stride: int) -> tuple[int, int]:
    return (x.shape[2] - 3) // stride + 1, (x.shape[3] - 3) // stride + 1


def _few_positions(x: Tensor, stride: int, limit: int = FEW_POSITIONS) -> bool:
    height, width = _output_size(x, stride)
    return x.device.type == "cpu" and len(x) * height * width <= limit


def _patch_rows(x: Tensor, stride: int) -> Tensor:
    """The 3x3 patches of [B, C, H, W], one row of length C * 9 for each output position."""
    patches = x.unfold(2, 3, stride).unfold(3, 3, stride)  # [B, C, H', W', 3, 3]
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * 9)


def _native_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's backward of a convolution: gradients of input, weight and bias as `mask` asks."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    return grads


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
    flat, wide = patches.flatten(2).to(precise), kernel.to(precise)
    covariance = flat @ flat.transpose(1, 2) / flat.shape[2]
    variance = ((wide @ covariance) * wide).sum(2)  # [B, C]
    slope = (scale * sign * torch.rsqrt(variance + eps)).to(x.dtype)
    pooled: Tensor = _MaxConv.apply(kernel, patches)
    out = torch.addcmul(shift[:, None], pooled, slope[:, :, None]).relu()
    return out.view(*out.shape[:2], (x.shape[2] - 2) // 2, (x.shape[3] - 2) // 2)


def _centred_patches(x: Tensor) -> Tensor:
    """Patches of [B, 1, H, W] less their mean: [B, 9, 4, P], P pooling windows of 4 positions each."""
    patches = x[:, 0].unfold(1, 3, 1).unfold(2, 3, 1)
    batch, height, width = patches.shape[:3]
    windows = patches.reshape(batch, height // 2, 2, width // 2, 2, 9)
    windows = windows.permute(0, 5, 2, 4, 1, 3).reshape(batch, 9, 4, -1)
    return windows - windows.mean((2, 3), keepdim=True)


class _MaxConv(torch.autograd.Function):
    """max over the 4 positions of a pooling window of kernel . patch: [C, 9], [B, 9, 4, P] -> [B, C, P].

    The derivative is that of the winning position, the first of equals, as in torch's max-pool.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor) -> Tensor:
        pooled, winners = [], []
        for part in patches.split(CHUNK):
            y = _responses(kernel, part)
            best = y.amax(2)
            wins = y == best[:, :, None]
            taken = wins[:, :, 0].clone()
            for position in range(1, 4):
                wins[:, :, position] &= ~taken
                taken |= wins[:, :, position]
            pooled.append(best)
            winners.append(wins)
        ctx.save_for_backward(patches, _joined(winners))
        return _joined(pooled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None


class _Spread(torch.autograd.Function):
    """Gradient of the kernel from that of the winners: [B, C, P] -> [C, 9]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, patches: Tensor, winners: Tensor) -> Tensor:
        ctx.save_for_backward(patches, winners)
        total = grad.new_zeros(9, grad.shape[1])
        for g, part, wins in zip(*(t.split(CHUNK) for t in (grad, patches, winners)), strict=True):
            spread = (wins * g[:, :, None]).flatten(2)
            total += torch.bmm(part.flatten(2), spread.transpose(1, 2)).sum(0)
        return total.t()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return _Select.apply(v, *ctx.saved_tensors), None, None


class _Select(torch.autograd.Function):
    """What a kernel answers at the winning positions of another one: [C, 9] -> [B, C, P]."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor, winners: Tensor) -> Tensor:
        ctx.save_for_backward(patches, winners)
        parts = zip(patches.split(CHUNK), winners.split(CHUNK), strict=True)
        return _joined([(_responses(kernel, part) * wins).sum(2) for part, wins in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _responses(kernel: Tensor, patches: Tensor) -> Tensor:
    """kernel . patch for every position: [C, 9], [B, 9, 4, P] -> [B, C, 4, P]."""
    # Detached: torch.matmul takes a detour over copies where its matrix wants a gradient.
    y = torch.matmul(kernel.detach(), patches.flatten(2))
    return y.view(*y.shape[:2], *patches.shape[2:])


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
