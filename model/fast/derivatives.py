"""Layers with their first and second derivatives written out, for a batch of images.

Activations of blocks are [B, H, W, C]. A layer keeps what its formulas need of the batch that it was last
given: one object serves one batch. A layer has four methods. The first two give the gradients of an inner
step; the meta-gradient differentiates through that step.

- `forward(x, *params)`: the output, of the input and the layer's parameters in their order.
- `backward(grad, need_x)`: gradients of the input, where needed, and of the parameters from the output's.
- `double_backward(v_x, v_params)`: the cotangent of the output's gradient from those (v) of what `backward`
  returned; v_x is None of an input that had no gradient. It runs from the first layer to the last.
- `backward_both(grad, need_x)`: the vjp of `forward`, plus the vjp of the earlier `backward` with respect to
  input and parameters, which `double_backward` prepared. It runs from the last layer to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.fast import conv
from model.fast.matmul import matmul, outer

Grads = Sequence[Tensor]
CHUNK = 4  # grey images whose full-size activations exist at a time, few enough to stay in cache
UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
PIXELS = (0, 1, 2)  # the dimensions of [B, H, W, C] that gradients of a channel's parameters are summed over


class Conv:
    """3x3 convolution without padding; its parameters are the kernel and, where there is one, the bias."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, *self.bias) = conv.Input(x, self.stride), params
        y = self.x.convolve(self.weight)
        return y + self.bias[0] if self.bias else y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        to_x, to_weight = self.x.gradients(grad, self.weight, need_x)
        return to_x, self._grads(to_weight, grad)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        self.v_weight, *v_bias = v_params
        v_grad = self.x.convolve(self.v_weight)
        self.v_x = None if v_x is None else conv.Input(v_x, self.stride)
        if self.v_x is not None:
            v_grad += self.v_x.convolve(self.weight)
        return v_grad + v_bias[0] if v_bias else v_grad

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        to_x, to_weight = self.x.gradients(grad, self.weight, need_x)
        if self.v_x is not None:
            to_weight += self.v_x.gradients(self.grad, self.weight, need_x=False)[1]
        if to_x is not None:
            to_x += self.x.grad_input(self.grad, self.v_weight)
        return to_x, self._grads(to_weight, grad)

    def _grads(self, to_weight: Tensor, grad: Tensor) -> Grads:
        return (to_weight, grad.sum(PIXELS)) if self.bias else (to_weight,)


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


class Block:
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


class GreyBlock:
    """`model.layers.ConvBlock` of grey images, whose norm needs no activations of full size.

    Images come as `grey_patches`. With w the kernel summed over its equal channels and Cov the covariance of
    an image's patches, the variance of a channel's outputs is w.Cov.w. So the norm is applied to the kernel,
    in float64: u = r w with r = 1 / sqrt(w.Cov.w + eps). The output is linear in the kernel s u, where s is
    the scale, and in the shift, where the pool's maxima are. With t = Cov u, du = r (dw - u (t.dw)).
    """

    def __init__(self, eps: float) -> None:
        self.eps, self.pools = eps, list[MaxPool]()

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, self.bias, scale, shift) = x, params
        flat = x[..., :9].flatten(1, 2).double()
        self.covariance = _bmm(flat.transpose(1, 2), flat) / flat.shape[1]  # [B, 9, 9]
        w, self.s = self._of_weight(self.weight), scale.double()[:, None]
        variance = _dot(_bmm(w, self.covariance), w)
        self.r = torch.rsqrt(variance + self.eps)  # [B, C, 1]
        self.u = self.r * w  # [B, C, 9]
        self.t = _bmm(self.u, self.covariance)
        kernel = self._with_shift(self.s * self.u, shift)
        self.pools = []
        self.y = x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(scale))
        for patches, of_image, y in zip(*self._chunks(x, kernel, self.y), strict=True):
            self.pools.append(MaxPool())
            torch.clamp_min(self.pools[-1].forward(_responses(patches, of_image)), 0, out=y)
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.g, to_shift = self._to_kernel(grad)
        self.to_w, self.to_s = self._through_norm(self.g)
        return None, self._grads(self.s * self.to_w, self.to_s, to_shift)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        v_weight, _, v_scale, v_shift = v_params
        v_w, v_s = self._of_weight(v_weight), v_scale.double()[:, None]
        along = _dot(self.t, v_w)
        v_u = self.r * (v_w - self.u * along)
        self.left_s = _dot(self.g, v_u)
        of_t = (_dot(self.g, v_w) - 2 * self.to_s * along) * self.t
        of_t += self.to_s * _bmm(v_w, self.covariance)
        self.left_w = (v_s - self.s * self.r * along) * self.to_w - self.s * self.r**2 * of_t
        kernel = self._with_shift(v_s * self.u + self.s * v_u, v_shift)
        parts = zip(self.pools, *self._chunks(self.x, kernel), strict=True)
        selected = torch.cat([pool.select(_responses(patches, of)) for pool, patches, of in parts])
        return _where_positive(selected, self.y)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        g, to_shift = self._to_kernel(grad)
        to_w, to_s = self._through_norm(g)
        return None, self._grads(self.left_w + self.s * to_w, self.left_s + to_s, to_shift)

    def _of_weight(self, weight: Tensor) -> Tensor:
        """A weight [C, 3, 3, 3] as w, [1, C, 9]."""
        return weight.sum(1).flatten(1).double()[None]

    def _through_norm(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of w [B, C, 9], before the factor s, and of s [B, C, 1] from g, that of the kernel."""
        to_s = _dot(self.u, g)
        return self.r * (g - self.t * to_s), to_s

    def _chunks(self, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
        """A few images of each, on other devices than the CPU all."""
        size = CHUNK if self.x.device.type == "cpu" else len(self.x)
        return (tensor.split(size) for tensor in tensors)

    def _with_shift(self, kernel: Tensor, shift: Tensor) -> Tensor:
        """Kernels [B, C, 9] and the shift as one [B, C, 10]: the last column of `grey_patches` is 1."""
        return torch.cat([kernel.to(self.x.dtype), shift.expand(len(kernel), -1)[:, :, None]], 2)

    def _to_kernel(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the kernels [B, C, 9] and of the shift [C] from the output's."""
        parts = []
        for pool, x, g, y in zip(self.pools, *self._chunks(self.x, grad, self.y), strict=True):
            spread = pool.spread(_where_positive(g, y)).flatten(1, 2)
            parts.append(_bmm(spread.transpose(1, 2), x.flatten(1, 2)))
        to_kernel = torch.cat(parts)
        return to_kernel[:, :, :9].double(), to_kernel[:, :, 9].sum(0)

    def _grads(self, to_w: Tensor, to_s: Tensor, to_shift: Tensor) -> Grads:
        """Those of the parameters; all channels of the weight have the same."""
        weight = to_w.sum(0).to(self.x.dtype).view(-1, 1, 3, 3).expand_as(self.weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, torch.zeros_like(self.bias), to_s.sum((0, 2)).to(self.x.dtype), to_shift


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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B, C, K] and [B, C, K] -> [B, C, 1]"""
    return (a * b).sum(2, keepdim=True)


def _where_positive(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of a ReLU whose output is `y`."""
    passed: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
    return passed


class Autograd:
    """Any function of a tensor and parameters, with autograd's derivatives: for what takes little time."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.inputs = [value.detach().requires_grad_() for value in (x, *params)]
        with torch.enable_grad():
            self.y = self.function(*self.inputs)
        return self.y.detach()

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad.detach().requires_grad_()
        self.grads = torch.autograd.grad(self.y, self.inputs[not need_x :], self.grad, create_graph=True)
        found = [grad.detach().contiguous() for grad in self.grads]
        return (found[0], found[1:]) if need_x else (None, found)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        v = v_params if v_x is None else (v_x, *v_params)
        of = [self.grad, *self.inputs]
        v_grad, *self.left = torch.autograd.grad(self.grads, of, v, retain_graph=True, **UNUSED)
        return v_grad

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        found = torch.autograd.grad(self.y, self.inputs, grad)
        to_x, *grads = ((one + other).contiguous() for one, other in zip(found, self.left, strict=True))
        return to_x, grads


class Linear:
    """`nn.Linear`, [B, I] -> [B, O]."""

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, bias) = x, params
        return matmul(x, self.weight.t()) + bias

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        return matmul(grad, self.weight) if need_x else None, (outer(grad, self.x), grad.sum(0))

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        self.v_x, (self.v_weight, v_bias) = v_x, v_params
        v_grad = matmul(self.x, self.v_weight.t()) + v_bias
        return v_grad if v_x is None else v_grad + matmul(v_x, self.weight.t())

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        to_weight = outer(grad, self.x)
        if self.v_x is not None:
            to_weight += outer(self.grad, self.v_x)
        to_x = matmul(grad, self.weight) + matmul(self.grad, self.v_weight) if need_x else None
        return to_x, (to_weight, grad.sum(0))


Layer = Block | Conv | GreyBlock | Linear | Autograd


class Chain:
    """Layers one after the other, for one batch.

    Args:
        layers: in order, each with the names of its parameters.
    """

    def __init__(self, layers: Sequence[tuple[Layer, Sequence[str]]]) -> None:
        self.layers = layers

    def forward(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The output, with params by name."""
        for layer, names in self.layers:
            x = layer.forward(x, *(params[name] for name in names))
        return x

    def backward(self, grad: Tensor, need_x: bool, both: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Gradients of the input, where needed, and of the params; `both`: by `backward_both`."""
        of_params: dict[str, Tensor] = {}
        to_x: Tensor | None = grad
        for k, (layer, names) in reversed(list(enumerate(self.layers))):
            assert to_x is not None
            to_x, grads = (layer.backward_both if both else layer.backward)(to_x, need_x or k > 0)
            of_params.update(zip(names, grads, strict=True))
        return to_x if need_x else None, of_params

    def double_backward(self, v_params: Mapping[str, Tensor]) -> Tensor:
        """Cotangent of the output's gradient from those of the params' gradients."""
        v: Tensor | None = None
        for layer, names in self.layers:
            v = layer.double_backward(v, [v_params[name] for name in names])
        assert v is not None
        return v
