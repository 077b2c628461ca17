"""Layers with their first and second derivatives written out, for a batch of images.

Activations of blocks are [B, H, W, C]. A layer keeps what its formulas need of the batch that it was last
given: one object serves one batch.

`forward` and `backward` give the gradients of an inner step. The meta-gradient differentiates through that
step: `double_backward` is the vjp of `backward` with respect to the output's gradient, from the first layer
to the last, and then `backward_both`, from the last layer to the first, is the vjp of `forward` plus the vjp
of `backward` with respect to input and parameters. Cotangents of what `backward` returned are called v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.fast import conv
from model.fast.matmul import matmul, row_matmul

Grads = Sequence[Tensor]
CHUNK = 4  # grey images whose full-size activations exist at a time, few enough to stay in cache
PIXELS = (0, 1, 2)  # the dimensions of [B, H, W, C] that gradients of a channel's parameters are summed over


class Layer:
    """A layer without parameters or with few, and its derivatives."""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        """The output, of the input and the layer's parameters in their order."""
        raise NotImplementedError

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        """Gradients of the input, where needed, and of the parameters from the output's gradient."""
        raise NotImplementedError

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        """Cotangent of the output's gradient from those of `backward`'s results; none of an input that had
        no gradient."""
        raise NotImplementedError

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        """`backward` at the cotangent `grad`, plus the vjp of the earlier `backward` that
        `double_backward` prepared."""
        raise NotImplementedError


class Conv(Layer):
    """3x3 convolution without padding; its parameters are the kernel and, where there is one, the bias."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, *self.bias) = x, params
        self.patches = self._im2col(x)
        y = conv.convolve(x, self.weight, self.stride, self.patches)
        return y + self.bias[0] if self.bias else y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        to_x, to_weight = conv.gradients(grad, self.x, self.weight, self.stride, self.patches, need_x)
        return to_x, self._grads(to_weight, grad)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        self.v_x, (self.v_weight, *v_bias) = v_x, v_params
        v_grad = conv.convolve(self.x, self.v_weight, self.stride, self.patches)
        if v_x is not None:
            self.v_patches = self._im2col(v_x)
            v_grad += conv.convolve(v_x, self.weight, self.stride, self.v_patches)
        return v_grad + v_bias[0] if v_bias else v_grad

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        terms = [(grad, self.x, self.patches)]
        if self.v_x is not None:
            terms.append((self.grad, self.v_x, self.v_patches))
        to_weight = conv.grad_weight(terms, self.weight, self.stride)
        pairs = [(grad, self.weight), (self.grad, self.v_weight)]
        to_x = conv.grad_input(pairs, self.x, self.stride) if need_x else None
        return to_x, self._grads(to_weight, grad)

    def _grads(self, to_weight: Tensor, grad: Tensor) -> Grads:
        return (to_weight, grad.sum(PIXELS)) if self.bias else (to_weight,)

    def _im2col(self, x: Tensor) -> Tensor | None:
        return conv.im2col(x, self.stride) if conv.few_positions(x, self.stride) else None


class MaxPool:
    """2x2 max-pool, [B, H, W, C] -> [B, H // 2, W // 2, C]. Its derivatives are linear maps."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        values, winners = torch.ops.aten.max_pool2d_with_indices(x.permute(0, 3, 1, 2), [2, 2], [2, 2])
        small = torch.int16 if x.shape[1] * x.shape[2] < 2**15 else torch.int32  # a quarter of the memory
        self.winners = winners if len(x) == 1 else winners.to(small)
        return values.permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def spread(self, grad: Tensor) -> Tensor:
        """The gradient of the input: each value goes to the pixel that it came from."""
        to_x = torch.ops.aten.max_pool2d_with_indices_backward(
            *(grad.contiguous().permute(0, 3, 1, 2), grad.new_empty(self.shape).permute(0, 3, 1, 2)),
            *([2, 2], [2, 2], [0, 0], [1, 1], False, self.winners.long()),
        )
        return to_x.permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def select(self, v: Tensor) -> Tensor:
        """The transpose of `spread`: of [B, H, W, C] the pixels that won."""
        winners = self.winners.permute(0, 2, 3, 1)
        return v.flatten(1, 2).gather(1, winners.flatten(1, 2).long()).view(winners.shape)


class Norm:
    """Norm of each image and channel over its pixels, z = (x - mean) * r with r = sign / std."""

    def forward(self, x: Tensor, sign: Tensor, eps: float) -> Tensor:
        """[B, H, W, C] -> z of the same shape; `sign` [C] is 1 or -1."""
        self.shape, x = x.shape, x.flatten(1, 2)
        z = x - x.mean(1, keepdim=True)
        self.r = torch.rsqrt((z * z).mean(1, keepdim=True) + eps) * sign
        self.z = z.mul_(self.r)
        return self.z.view(self.shape)

    def backward(self, grad: Tensor) -> Tensor:
        """r * (g - mean(g) - z * mean(g z))"""
        self.grad = grad.flatten(1, 2)
        to_x, self.mean, self.mean_z = self._project(self.grad)
        return to_x.view(self.shape)

    def double_backward(self, v: Tensor) -> Tensor:
        """The cotangent of `grad`; leaves that of the input in `left`.

        z and r are functions of x: dz = r * (dx - mean(dx) - z * mean(z dx)), dr = -r * r * mean(z dx).
        """
        v, g, z, r = v.flatten(1, 2), self.grad, self.z, self.r
        v_grad, mean_v, mean_vz = self._project(v)
        along_z = (v * g).mean(1, keepdim=True) - mean_v * self.mean - 3 * mean_vz * self.mean_z
        mean = mean_vz * self.mean + self.mean_z * mean_v
        left = torch.addcmul(-mean, z, along_z).addcmul_(g, mean_vz).addcmul_(v, self.mean_z).mul_(-r * r)
        self.left = left.view(self.shape)
        return v_grad.view(self.shape)

    def backward_both(self, grad: Tensor) -> Tensor:
        """`backward` at the cotangent `grad`, plus what `double_backward` left."""
        return self._project(grad.flatten(1, 2))[0].view(self.shape).add_(self.left)

    def _project(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, mean_z = g.mean(1, keepdim=True), (g * self.z).mean(1, keepdim=True)
        to_x = torch.addcmul(mean, self.z, mean_z)
        return torch.sub(g, to_x, out=to_x).mul_(self.r), mean, mean_z


class Block(Layer):
    """`model.layers.ConvBlock`: convolution, norm, ReLU and, where asked, max-pool.

    Pooling comes before scale and shift, on a quarter of the work. The norm takes the scale's sign, so that
    the largest scaled value is that of the largest value.
    """

    def __init__(self, eps: float, pool: bool) -> None:
        self.eps, self.pool = eps, MaxPool() if pool else None
        self.conv, self.norm = Conv(), Norm()

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        weight, _, scale, shift = params
        self.sign = torch.ones_like(scale).copysign(scale)
        self.scale = scale * self.sign
        z = self.norm.forward(self.conv.forward(x, weight), self.sign, self.eps)
        self.pooled = self.pool.forward(z) if self.pool else z
        self.y = torch.addcmul(shift, self.pooled, self.scale).relu_()
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.passed = _where_positive(grad, self.y)
        spread = self.passed * self.scale
        to_conv = self.norm.backward(self.pool.spread(spread) if self.pool else spread)
        to_x, to_weight = self.conv.backward(to_conv, need_x)
        return to_x, self._grads(to_weight[0], self.passed * self.pooled, self.passed)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        v_weight, _, v_scale, v_shift = v_params
        v_scale = v_scale * self.sign
        v = self.norm.double_backward(self.conv.double_backward(v_x, (v_weight,)))
        v = self.pool.select(v) if self.pool else v
        self.left_scale, self.left_pooled = v * self.passed, self.passed * v_scale
        return _where_positive(torch.addcmul(v_shift, self.pooled, v_scale).addcmul_(v, self.scale), self.y)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        passed = _where_positive(grad, self.y)
        spread = torch.addcmul(self.left_pooled, passed, self.scale)
        spread = self.pool.spread(spread) if self.pool else spread
        to_conv = self.norm.backward_both(spread)
        to_x, to_weight = self.conv.backward_both(to_conv, need_x)
        return to_x, self._grads(to_weight[0], torch.addcmul(self.left_scale, passed, self.pooled), passed)

    def _grads(self, weight: Tensor, scale: Tensor, shift: Tensor) -> Grads:
        """Those of the parameters, from scale and shift at each pixel. The bias has no effect."""
        return weight, torch.zeros_like(self.sign), scale.sum(PIXELS).mul_(self.sign), shift.sum(PIXELS)


class GreyBlock(Layer):
    """`model.layers.ConvBlock` of grey images, whose norm needs no activations of full size.

    Images come as `grey_patches`. With w the kernel summed over its equal channels and Cov the covariance of
    an image's patches, the variance of a channel's outputs is w.Cov.w, so that the kernel is normalised in
    place of the outputs: v = w * f with f = s * i, i = 1 / sqrt(w.q + eps), q = Cov w and s the norm's scale.
    (In the code: `wide`, `factor`, `scale`, `inverse` and `turned`; the last four for each image.) What is
    that small is formed in float64. The output is linear in v and the shift where the pool's maxima are.
    """

    def __init__(self, eps: float) -> None:
        self.eps, self.pools = eps, list[MaxPool]()

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        weight, _, scale, shift = params
        self.x, self.shape = x, weight.shape
        flat = x[..., :9].flatten(1, 2).double()
        self.covariance = _bmm(flat.transpose(1, 2), flat) / flat.shape[1]  # [B, 9, 9]
        self.wide = weight.sum(1).flatten(1).double()  # [C, 9]
        self.scale = scale.double()
        self.turned = _bmm(self.wide[None], self.covariance)  # [B, C, 9]
        self.inverse = torch.rsqrt((self.turned * self.wide).sum(2) + self.eps)  # [B, C]
        self.factor = (self.scale * self.inverse)[:, :, None]
        kernel = self._with_shift(self.wide * self.factor, shift)
        self.pools = []
        self.y = x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(weight))
        for patches, of_image, y in zip(*self._chunks(x, kernel, self.y), strict=True):
            self.pools.append(MaxPool())
            torch.clamp_min(self.pools[-1].forward(_responses(patches, of_image)), 0, out=y)
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.to_kernel, to_shift = self._to_kernel(grad)
        self.along = (self.to_kernel * self.wide).sum(2)
        self.to_variance = -0.5 * self.along * self.scale * self.inverse**3
        to_wide = self.to_kernel * self.factor + 2 * self.to_variance[:, :, None] * self.turned
        return None, self._grads(to_wide, self.along * self.inverse, to_shift)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        v_weight, _, v_scale, v_shift = v_params
        wide, scale = v_weight.sum(1).flatten(1).double(), v_scale.double()
        cube = 0.5 * self.inverse**3
        variance = 2 * (wide * self.turned).sum(2)
        along = scale * self.inverse - cube * self.scale * variance
        self.left_wide = along[:, :, None] * self.to_kernel
        self.left_turned = 2 * self.to_variance[:, :, None] * wide
        self.left_scale = -cube * self.along * variance
        self.left_inverse = self.along * (scale - 1.5 * self.scale * self.inverse**2 * variance)
        self.left_factor = (wide * self.to_kernel).sum(2)
        kernel = self._with_shift(wide * self.factor + along[:, :, None] * self.wide, v_shift)
        parts = zip(self.pools, *self._chunks(self.x, kernel), strict=True)
        selected = torch.cat([pool.select(_responses(patches, of)) for pool, patches, of in parts])
        return _where_positive(selected, self.y)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        to_kernel, to_shift = self._to_kernel(grad)
        factor = self.left_factor + (to_kernel * self.wide).sum(2)
        inverse = self.left_inverse + factor * self.scale
        variance = (-0.5 * self.inverse**3 * inverse)[:, :, None]
        turned = self.left_turned + variance * self.wide
        to_wide = (
            self.left_wide + to_kernel * self.factor + variance * self.turned + _bmm(turned, self.covariance)
        )
        return None, self._grads(to_wide, self.left_scale + factor * self.inverse, to_shift)

    def _chunks(self, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
        """A few images of each, on other devices than the CPU all."""
        size = CHUNK if self.x.device.type == "cpu" else len(self.x)
        return (tensor.split(size) for tensor in tensors)

    def _with_shift(self, kernel: Tensor, shift: Tensor) -> Tensor:
        """Kernels [B, C, 9] and the shift as one [B, C, 10]: the last column of `grey_patches` is 1."""
        return torch.cat([kernel.to(self.x.dtype), shift.expand(len(kernel), -1)[:, :, None]], 2)

    def _to_kernel(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the normalised kernels [B, C, 9] and of the shift [B, C] from the output's."""
        parts = []
        for pool, x, g, y in zip(self.pools, *self._chunks(self.x, grad, self.y), strict=True):
            spread = pool.spread(_where_positive(g, y)).flatten(1, 2)
            parts.append(_bmm(spread.transpose(1, 2), x.flatten(1, 2)))
        to_kernel = torch.cat(parts)
        return to_kernel[:, :, :9].double(), to_kernel[:, :, 9]

    def _grads(self, wide: Tensor, scale: Tensor, shift: Tensor) -> Grads:
        """Those of the parameters, from each image's; all channels of the kernel have the same."""
        weight = wide.sum(0).to(self.x.dtype).view(-1, 1, 3, 3).expand(self.shape)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, torch.zeros_like(weight[:, 0, 0, 0]), scale.sum(0).to(self.x.dtype), shift.sum(0)


def grey_patches(x: Tensor) -> Tensor:
    """The 3x3 patches of grey images less their mean, and a 1, which is the shift's input:
    [B, 1, H, W] -> [B, H - 2, W - 2, 10]."""
    patches = x[:, 0].unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    return torch.nn.functional.pad(patches - patches.mean((1, 2), keepdim=True), (0, 1), value=1)


def _responses(patches: Tensor, kernel: Tensor) -> Tensor:
    """[B, H, W, K] and a kernel [B, C, K] for each image -> [B, H, W, C]"""
    return _bmm(patches.flatten(1, 2), kernel.transpose(1, 2)).view(*patches.shape[:3], -1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices; of a single pair as the faster product of two matrices."""
    return (a[0] @ b[0])[None] if len(b) == 1 else a @ b


def _where_positive(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of a ReLU whose output is `y`."""
    passed: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
    return passed


class Flatten(Layer):
    """[B, H, W, C] -> [B, C * H * W]"""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.shape = x.permute(0, 3, 1, 2).shape
        return x.permute(0, 3, 1, 2).flatten(1)

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return grad.view(self.shape).permute(0, 2, 3, 1).contiguous(), ()

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        assert v_x is not None
        return v_x.permute(0, 3, 1, 2).flatten(1)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return self.backward(grad, need_x)


class Linear(Layer):
    """`nn.Linear`, [B, I] -> [B, O]."""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, bias) = x, params
        return _product(x, self.weight.t()) + bias

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        to_x = _product(grad, self.weight) if need_x else None
        return to_x, (outer(grad, self.x), grad.sum(0))

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        self.v_x, (self.v_weight, v_bias) = v_x, v_params
        v_grad = _product(self.x, self.v_weight.t()) + v_bias
        return v_grad if v_x is None else v_grad + _product(v_x, self.weight.t())

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        to_weight = outer(grad, self.x)
        if self.v_x is not None:
            to_weight += outer(self.grad, self.v_x)
        to_x = _product(grad, self.weight) + _product(self.grad, self.v_weight) if need_x else None
        return to_x, (to_weight, grad.sum(0))


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, where the matrix is a weight or its transpose."""
    return row_matmul(x, matrix) if len(x) == 1 else matmul(x, matrix)


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad.t() @ x, the gradient of a linear layer's weight: [B, O] and [B, I] -> [O, I]."""
    return torch.outer(grad[0], x[0]) if len(x) == 1 else matmul(grad.t(), x)


class Sigmoid(Layer):
    """1 / (1 + exp(-x))"""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.y = x.sigmoid()
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        return torch.ops.aten.sigmoid_backward(grad, self.y), ()

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        assert v_x is not None
        self.left_y = v_x * self.grad * (1 - 2 * self.y)
        v_grad: Tensor = torch.ops.aten.sigmoid_backward(v_x, self.y)
        return v_grad

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return torch.ops.aten.sigmoid_backward(grad + self.left_y, self.y), ()


class ReLU(Layer):
    """max(x, 0)"""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.y = x.relu()
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return _where_positive(grad, self.y), ()

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        assert v_x is not None
        return _where_positive(v_x, self.y)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        return _where_positive(grad, self.y), ()


class Chain:
    """Layers one after the other, for one batch.

    Args:
        layers: in order.
        own: which of the parameters each has.
    """

    def __init__(self, layers: Sequence[Layer], own: Sequence[slice]) -> None:
        self.layers, self.own = layers, own

    def forward(self, x: Tensor, params: Grads) -> Tensor:
        """The output, with the parameters of all layers in order."""
        for layer, own in zip(self.layers, self.own, strict=True):
            x = layer.forward(x, *params[own])
        return x

    def backward(self, grad: Tensor, need_x: bool, both: bool = False) -> tuple[Tensor | None, Grads]:
        """Gradients of the input, where needed, and of all parameters; `both`: by `backward_both`."""
        grads: list[Tensor] = []
        for k in reversed(range(len(self.layers))):
            layer = self.layers[k]
            to_x, of_layer = (layer.backward_both if both else layer.backward)(grad, need_x or k > 0)
            grads[:0] = of_layer
            if to_x is not None:
                grad = to_x
        return grad if need_x else None, grads

    def double_backward(self, v_params: Grads) -> Tensor:
        """Cotangent of the output's gradient from those of the parameters' gradients."""
        v: Tensor | None = None
        for layer, own in zip(self.layers, self.own, strict=True):
            v = layer.double_backward(v, v_params[own])
        assert v is not None
        return v
