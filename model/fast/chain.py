"""The layers of a chain on a single image, with their derivatives written out.

The inner loop and meta-test apply them to one image at a time, where autograd's record of a few hundred small
operations takes as long as the arithmetic. Here a layer keeps what its own formulas need, and no more.
Activations of blocks are rows of channels, [H * W, C], of square images; kernels are the rows that multiply
patches, [O, 9 * I].

`forward` and `backward` give the gradients of an inner step. Where the loss at the fast weights is
differentiated through them, the layers are passed twice again: from first to last `double_backward` gives the
derivative of `backward`, and then from last to first `backward_both` that of `forward`, together with what
`backward` owes to the same activations and parameters.

Names: `to_x` is the gradient of x, `left_x` the part of it that `double_backward` leaves for `backward_both`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from model.fast.conv import channels_last, kernel_of_rows, kernel_rows, to_image
from model.fast.first_block import centred_patches
from model.fast.layers import FastConv2d, FastConvBlock, FastLinear, is_grey
from model.fast.matmul import matmul, row_matmul
from model.fast.norm import norm, norm_backward, norm_double_backward
from model.fast.winograd import add_up
from model.layers import ImageNorm

Grads = Sequence[Tensor]
PLAIN_3X3 = ((3, 3), (1, 1), (0, 0), (1, 1), 1)  # what of a convolution `Block` computes


class Layer:
    """A stage of a chain. What a pass keeps is for the next pass over the same image."""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        """The output, of the input and the stage's parameters in their order."""
        raise NotImplementedError

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        """Gradients of the input, where needed, and of the parameters from that of the output."""
        raise NotImplementedError

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        """Gradient of what `backward` was given from those of what it gave."""
        raise NotImplementedError

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        """As `backward`, with what `double_backward` has left of input and parameters."""
        raise NotImplementedError


class Pooled(Layer):
    """What blocks have in common: the 2x2 max-pool of [H * W, C]."""

    def _max_pool(self, x: Tensor) -> Tensor:
        self.side = math.isqrt(len(x))
        values, self.winners = torch.ops.aten.max_pool2d_with_indices(self._image(x), [2, 2], [2, 2])
        return _rows(values)

    def _spread(self, grad: Tensor) -> Tensor:
        """The gradient of `_max_pool`: each value to where it came from."""
        side = math.isqrt(len(grad))
        like = grad.new_empty(self.side**2, grad.shape[1])
        return _rows(
            torch.ops.aten.max_pool2d_with_indices_backward(
                to_image(grad.contiguous(), side, side),
                *(self._image(like), [2, 2], [2, 2], [0, 0], [1, 1], False, self.winners),
            )
        )

    def _select(self, x: Tensor) -> Tensor:
        """The derivative of `_max_pool`: of other rows the values in the same places."""
        return x.gather(0, _rows(self.winners))

    def _image(self, rows: Tensor) -> Tensor:
        return to_image(rows, self.side, self.side)


class GreyBlock(Pooled):
    """`first_block.grey_block` of one image, which comes as the patches of `entering`.

    With w the kernel summed over its channels and s the norm's scale, the normalised kernel is v = w * f
    where f = s * i, i = 1 / sqrt(w.q + eps) and q = w Cov (here `wide`, `scale`, `factor`, `inverse` and
    `turned`). The output is linear in v and the shift at the places where the pool's maxima are.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        weight, _, scale, shift = params
        self.x, self.shape = x, weight.shape
        flat = x[:, :9].double()
        self.covariance = flat.t() @ flat / len(flat)
        self.wide = weight.sum(1).flatten(1).double()
        self.scale = scale.double()
        self.turned = self.wide @ self.covariance
        self.inverse = torch.rsqrt((self.turned * self.wide).sum(1) + self.eps)
        self.factor = (self.scale * self.inverse)[:, None]
        kernel = torch.cat([(self.wide * self.factor).to(x.dtype), shift[:, None]], 1)
        self.y = self._max_pool(x @ kernel.t()).clamp_min_(0)
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.to_kernel, to_shift = self._to_kernel(grad)
        self.along = (self.to_kernel * self.wide).sum(1)
        self.to_variance = -0.5 * self.along * self.scale * self.inverse**3
        to_wide = self.to_kernel * self.factor + 2 * self.to_variance[:, None] * self.turned
        return None, self._grads(to_wide, self.along * self.inverse, to_shift)

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        to_weight, _, to_scale, to_shift = grad_params
        wide, scale = to_weight.sum(1).flatten(1).double(), to_scale.double()
        cube = 0.5 * self.inverse**3
        variance = 2 * (wide * self.turned).sum(1)
        along = scale * self.inverse - cube * self.scale * variance
        self.left_wide = along[:, None] * self.to_kernel
        self.left_turned = 2 * self.to_variance[:, None] * wide
        self.left_scale = -cube * self.along * variance
        self.left_inverse = self.along * (scale - 1.5 * self.scale * self.inverse**2 * variance)
        self.left_factor = (wide * self.to_kernel).sum(1)
        kernel = (wide * self.factor + along[:, None] * self.wide).to(self.x.dtype)
        responses = self.x @ torch.cat([kernel, to_shift[:, None]], 1).t()
        passed: Tensor = torch.ops.aten.threshold_backward(self._select(responses), self.y, 0)
        return passed

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        to_kernel, to_shift = self._to_kernel(grad)
        factor = self.left_factor + (to_kernel * self.wide).sum(1)
        inverse = self.left_inverse + factor * self.scale
        variance = (-0.5 * self.inverse**3 * inverse)[:, None]
        turned = self.left_turned + variance * self.wide
        to_wide = self.left_wide + to_kernel * self.factor + variance * self.turned + turned @ self.covariance
        return None, self._grads(to_wide, self.left_scale + factor * self.inverse, to_shift)

    def _to_kernel(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the normalised kernel [C, 9] and the shift [C] from that of the output."""
        passed = torch.ops.aten.threshold_backward(grad, self.y, 0)
        to_kernel = (self.x.t() @ self._spread(passed)).t()
        return to_kernel[:, :9].double(), to_kernel[:, 9]

    def _grads(self, wide: Tensor, scale: Tensor, shift: Tensor) -> Grads:
        """Those of the parameters in their shapes; all channels of the kernel have the same."""
        weight = wide.to(self.x.dtype).view(-1, 1, 3, 3).expand(self.shape)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, torch.zeros_like(shift), scale.to(self.x.dtype), shift


class Block(Pooled):
    """`FastConvBlock` of one image, [H * W, I] -> [H' * W', O]."""

    def __init__(self, eps: float, pool: bool) -> None:
        self.eps, self.pool = eps, pool

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        weight, _, scale, shift = params
        self.kernel = kernel_rows(weight)
        self.patches = _patches(x)
        self.sign = torch.ones_like(scale).copysign(scale)
        self.scale = scale * self.sign
        self.z, self.r = norm(matmul(self.patches, self.kernel.t()), self.sign, self.eps)
        self.pooled = self._max_pool(self.z) if self.pool else self.z
        self.y = torch.addcmul(shift, self.pooled, self.scale).relu_()
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.passed = torch.ops.aten.threshold_backward(grad, self.y, 0)
        spread = self.passed * self.scale
        self.to_z = self._spread(spread) if self.pool else spread
        self.to_conv, *self.means = norm_backward(self.to_z, self.z, self.r)
        to_x = _images(matmul(self.to_conv, self.kernel)) if need_x else None
        to_weight = kernel_of_rows(matmul(self.to_conv.t(), self.patches))
        return to_x, self._grads(to_weight, self.passed * self.pooled, self.passed)

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        to_weight, _, to_scale, to_shift = grad_params
        self.to_kernel, scale = kernel_rows(to_weight), to_scale * self.sign
        conv = matmul(self.patches, self.to_kernel.t())
        self.to_patches = None if grad_x is None else _patches(grad_x)
        if self.to_patches is not None:
            conv += matmul(self.to_patches, self.kernel.t())
        spread, self.left_conv = norm_double_backward(conv, self.to_z, self.z, self.r, *self.means)
        spread = self._select(spread) if self.pool else spread
        self.left_scale = spread * self.passed
        self.left_pooled = self.passed * scale
        grad = torch.addcmul(to_shift, self.pooled, scale).addcmul_(spread, self.scale)
        passed: Tensor = torch.ops.aten.threshold_backward(grad, self.y, 0)
        return passed

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        passed = torch.ops.aten.threshold_backward(grad, self.y, 0)
        spread = torch.addcmul(self.left_pooled, passed, self.scale)
        spread = self._spread(spread) if self.pool else spread
        conv = norm_backward(spread, self.z, self.r)[0].add_(self.left_conv)
        to_scale = torch.addcmul(self.left_scale, passed, self.pooled)
        if self.to_patches is None:
            to_weight = kernel_of_rows(matmul(conv.t(), self.patches))
            return None, self._grads(to_weight, to_scale, passed)
        left = torch.cat([conv, self.to_conv])
        to_weight = kernel_of_rows(matmul(left.t(), torch.cat([self.patches, self.to_patches])))
        to_x = _images(matmul(conv, self.kernel).add_(matmul(self.to_conv, self.to_kernel)))
        return to_x, self._grads(to_weight, to_scale, passed)

    def _grads(self, weight: Tensor, scale: Tensor, shift: Tensor) -> Grads:
        """Those of the parameters; of scale and shift by pixel, before they are added up."""
        return weight, torch.zeros_like(self.sign), scale.sum(0).mul_(self.sign), shift.sum(0)


class Flatten(Layer):
    """[H * W, C] -> [1, C * H * W]"""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.shape = x.t().shape
        return x.t().reshape(1, -1)

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return grad.view(self.shape).t().contiguous(), ()

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        assert grad_x is not None
        return grad_x.t().reshape(1, -1)

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        return self.backward(grad, True)


class Linear(Layer):
    """`FastLinear`, [1, I] -> [1, O]."""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, bias) = x, params
        return row_matmul(x, self.weight.t()) + bias

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        to_x = row_matmul(grad, self.weight) if need_x else None
        return to_x, (torch.outer(grad[0], self.x[0]), grad[0])

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        self.grad_x, (self.to_weight, to_bias) = grad_x, grad_params
        to_grad = row_matmul(self.x, self.to_weight.t()) + to_bias
        return to_grad if grad_x is None else to_grad + row_matmul(grad_x, self.weight.t())

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        to_weight = torch.outer(grad[0], self.x[0])
        if self.grad_x is None:
            return None, (to_weight, grad[0])
        to_x = row_matmul(grad, self.weight) + row_matmul(self.grad, self.to_weight)
        return to_x, (to_weight.addr_(self.grad[0], self.grad_x[0]), grad[0])


class Sigmoid(Layer):
    """1 / (1 + exp(-x))"""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.y = x.sigmoid()
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        return torch.ops.aten.sigmoid_backward(grad, self.y), ()

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        assert grad_x is not None
        self.to_y = grad_x * self.grad * (1 - 2 * self.y)
        to_grad: Tensor = torch.ops.aten.sigmoid_backward(grad_x, self.y)
        return to_grad

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        return torch.ops.aten.sigmoid_backward(grad + self.to_y, self.y), ()


class ReLU(Layer):
    """max(x, 0)"""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.y = x.relu()
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return torch.ops.aten.threshold_backward(grad, self.y, 0), ()

    def double_backward(self, grad_x: Tensor | None, grad_params: Grads) -> Tensor:
        assert grad_x is not None
        to_grad: Tensor = torch.ops.aten.threshold_backward(grad_x, self.y, 0)
        return to_grad

    def backward_both(self, grad: Tensor) -> tuple[Tensor | None, Grads]:
        return self.backward(grad, need_x=True)


class Chain:
    """Stages of a network one after the other, on one image.

    Args:
        stages: of a known chain (`layers.is_known_chain`) on the CPU.
        grey: whether grey images enter the first.

    Raises:
        NotImplementedError: a stage has no derivatives here.
    """

    def __init__(self, stages: Iterable[nn.Module], grey: bool) -> None:
        self.doubled = False  # whether `double_backward` has left something
        self.layers: list[Layer] = []
        self.params: list[slice] = []  # of each stage, in the list of all
        start = 0
        for stage in stages:
            self.layers.append(_layer(stage, grey and not self.layers))
            self.params.append(slice(start, start := start + len(list(stage.parameters()))))

    def forward(self, x: Tensor, params: Grads) -> Tensor:
        """The output for one row of `entering`, with parameters in the order of the stages."""
        for layer, own in zip(self.layers, self.params, strict=True):
            x = layer.forward(x, *params[own])
        return x

    def backward(self, grad: Tensor) -> Grads:
        """Gradients of the parameters from that of the output."""
        grads: list[Tensor] = []
        for k in reversed(range(len(self.layers))):
            to_x, own = self.layers[k].backward(grad, need_x=k > 0)
            grads[:0] = own
            grad = grad if to_x is None else to_x
        return grads

    def double_backward(self, grads: Grads) -> Tensor:
        """Gradient of what `backward` was given from those of what it gave."""
        grad: Tensor | None = None
        for layer, own in zip(self.layers, self.params, strict=True):
            grad = layer.double_backward(grad, grads[own])
        assert grad is not None
        self.doubled = True
        return grad

    def backward_both(self, grad: Tensor) -> Grads:
        """As `backward`, with what `double_backward` has left, if it was called."""
        if not self.doubled:
            return self.backward(grad)
        grads: list[Tensor] = []
        for layer in reversed(self.layers):
            to_x, own = layer.backward_both(grad)
            grads[:0] = own
            grad = grad if to_x is None else to_x
        return grads


def _layer(stage: nn.Module, is_image: bool) -> Layer:
    if type(stage) is FastConvBlock and type(stage.norm) is ImageNorm and type(stage.conv) is FastConv2d:
        conv, norm = stage.conv, stage.norm
        if (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == PLAIN_3X3:
            if is_image and stage.pool:
                return GreyBlock(norm.eps)
            if not is_image:
                return Block(norm.eps, stage.pool)
    known = {nn.Flatten: Flatten, FastLinear: Linear, nn.Sigmoid: Sigmoid, nn.ReLU: ReLU}
    if type(stage) not in known:
        raise NotImplementedError(f"{type(stage).__name__} has no derivatives here")
    return known[type(stage)]()


def entering(x: Tensor) -> Tensor:
    """What `Chain.forward` takes of each of N images, [N, rows, channels].

    Args:
        x: images [N, C, H, W] or what frozen stages made of them, [N, C, H, W] or [N, F]. Of grey images the
            centred patches enter a block, and a one, which is the shift's input.
    """
    if x.ndim == 2:
        return x[:, None]
    if is_grey(x):
        return F.pad(centred_patches(x[:, :1]), (0, 1), value=1).flatten(1, 2)
    return channels_last(x).flatten(1, 2)


def _rows(image: Tensor) -> Tensor:
    """[1, C, H, W] as [H * W, C]"""
    return channels_last(image).reshape(-1, image.shape[1])


def _patches(x: Tensor) -> Tensor:
    """The 3x3 patches of [H * W, C], a row of 9 * C for each output position: three runs of memory."""
    side, channels = math.isqrt(len(x)), x.shape[1]
    x, down = x.contiguous(), side * channels
    runs = x.as_strided((side - 2, side - 2, 3, 3 * channels), (down, channels, down, 1), x.storage_offset())
    return runs.reshape(-1, 9 * channels)


def _images(patches: Tensor) -> Tensor:
    """The derivative of `_patches`: [(H - 2) * (W - 2), 9 * C] -> [H * W, C]"""
    side = math.isqrt(len(patches))
    parts = patches.view(1, side, side, 3, 3, -1)
    return add_up(parts, 1, (side + 2, side + 2)).view(-1, parts.shape[-1])
