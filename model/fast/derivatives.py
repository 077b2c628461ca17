"""Layers with their first and second derivatives written out, for a batch of images.

Activations of blocks are [B, H, W, C]. A layer stores intermediate results, so one layer object serves one
batch at a time. `forward` and `backward` give the gradients of an inner step. The other two methods
differentiate through that step.

- `forward(x, *params)`: the output, from the input and the layer's parameters in their order.
- `backward(grad, need_x)`: gradients of the input, where needed, and of the parameters from the output's.
- `double_backward(v_x, v_params)`: the cotangent of the output's gradient from the cotangents v of what
  `backward` returned; v_x is None where the input had no gradient. Layers are called from first to last.
- `backward_both(grad, need_x)`: the vjp of `forward`, plus the vjp of the earlier `backward` with respect to
  input and parameters, which `double_backward` prepared. Layers are called from last to first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.fast import conv
from model.fast.matmul import matmul, outer

Grads = Sequence[Tensor]
CHUNK = 4  # grey images whose full-size activations exist at a time, few enough to stay in cache
UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
PIXELS = (0, 1, 2)  # dimensions of [B, H, W, C] over which gradients of a channel's parameters are summed


class Conv:
    """3x3 convolution without padding; its parameters are the kernel and, where it exists, the bias."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, *self.bias) = conv.Input(x, self.stride), params
        y = self.x.convolve(self.weight)
        return y + self.bias[0] if self.bias else y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.grad = grad
        grad_x, grad_weight = self.x.gradients(grad, self.weight, need_x)
        return grad_x, self._grads(grad_weight, grad)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        self.v_weight, *v_bias = v_params
        v_grad = self.x.convolve(self.v_weight)
        self.v_x = None if v_x is None else conv.Input(v_x, self.stride)
        if self.v_x is not None:
            v_grad += self.v_x.convolve(self.weight)
        return v_grad + v_bias[0] if v_bias else v_grad

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        grad_x, grad_weight = self.x.gradients(grad, self.weight, need_x)
        if self.v_x is not None:
            grad_weight += self.v_x.gradients(self.grad, self.weight, need_x=False)[1]
        if grad_x is not None:
            grad_x += self.x.grad_input(self.grad, self.v_weight)
        return grad_x, self._grads(grad_weight, grad)

    def _grads(self, grad_weight: Tensor, grad: Tensor) -> Grads:
        return (grad_weight, grad.sum(PIXELS)) if self.bias else (grad_weight,)


class MaxPool:
    """2x2 max-pool, [B, H, W, C] -> [B, H // 2, W // 2, C]. Its derivatives are linear maps."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        values, indices = torch.ops.aten.max_pool2d_with_indices(x.permute(0, 3, 1, 2), [2, 2], [2, 2])
        small = torch.int16 if x.shape[1] * x.shape[2] < 2**15 else torch.int32  # a quarter of the memory
        self.indices = indices if len(x) == 1 else indices.to(small)
        return values.permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def spread(self, grad: Tensor) -> Tensor:
        """The gradient of the input: each value of `grad` goes to the pixel that was the maximum."""
        grad_x = torch.ops.aten.max_pool2d_with_indices_backward(
            *(grad.contiguous().permute(0, 3, 1, 2), grad.new_empty(self.shape).permute(0, 3, 1, 2)),
            *([2, 2], [2, 2], [0, 0], [1, 1], False, self.indices.long()),
        )
        return grad_x.permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def select(self, v: Tensor) -> Tensor:
        """The transpose of `spread`: the pixels of [B, H, W, C] that were maxima."""
        indices = self.indices.permute(0, 2, 3, 1)
        return v.flatten(1, 2).gather(1, indices.flatten(1, 2).long()).view(indices.shape)


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
        """The gradient of x: r * (g - mean(g) - z * mean(g z))."""
        self.grad = grad.flatten(1, 2)
        grad_x, self.mean, self.mean_z = self._project(self.grad)
        return grad_x.view(self.shape)

    def double_backward(self, v: Tensor) -> Tensor:
        """The cotangent of `grad`; sets `vjp_x`, the vjp of `backward` with respect to x.

        z and r are functions of x: dz = r * (dx - mean(dx) - z * mean(z dx)), dr = -r * r * mean(z dx).
        """
        v, g, z, r = v.flatten(1, 2), self.grad, self.z, self.r
        v_grad, mean_v, mean_vz = self._project(v)
        z_part = (v * g).mean(1, keepdim=True) - mean_v * self.mean - 3 * mean_vz * self.mean_z
        mean = mean_vz * self.mean + self.mean_z * mean_v
        vjp_x = torch.addcmul(-mean, z, z_part).addcmul_(g, mean_vz).addcmul_(v, self.mean_z).mul_(-r * r)
        self.vjp_x = vjp_x.view(self.shape)
        return v_grad.view(self.shape)

    def backward_both(self, grad: Tensor) -> Tensor:
        """`backward` at `grad`, plus `vjp_x`."""
        return self._project(grad.flatten(1, 2))[0].view(self.shape).add_(self.vjp_x)

    def _project(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, mean_z = g.mean(1, keepdim=True), (g * self.z).mean(1, keepdim=True)
        grad_x = torch.addcmul(mean, self.z, mean_z)
        return torch.sub(g, grad_x, out=grad_x).mul_(self.r), mean, mean_z


class Block:
    """`model.layers.ConvBlock`: convolution, norm, ReLU and, where asked, max-pool.

    Max-pool comes before scale and shift, which then cost a quarter. The norm is multiplied by the scale's
    sign, so that the maximum before scaling is the maximum after scaling.
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
        self.delta = _relu_backward(grad, self.y)  # gradient before the ReLU
        spread = self.delta * self.scale
        grad_conv = self.norm.backward(self.pool.spread(spread) if self.pool else spread)
        grad_x, grad_weight = self.conv.backward(grad_conv, need_x)
        return grad_x, self._grads(grad_weight[0], self.delta * self.pooled, self.delta)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        v_weight, _, v_scale, v_shift = v_params
        v_scale = v_scale * self.sign
        v = self.norm.double_backward(self.conv.double_backward(v_x, (v_weight,)))
        v = self.pool.select(v) if self.pool else v
        self.vjp_scale, self.vjp_pooled = v * self.delta, self.delta * v_scale
        return _relu_backward(torch.addcmul(v_shift, self.pooled, v_scale).addcmul_(v, self.scale), self.y)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        delta = _relu_backward(grad, self.y)
        spread = torch.addcmul(self.vjp_pooled, delta, self.scale)
        spread = self.pool.spread(spread) if self.pool else spread
        grad_conv = self.norm.backward_both(spread)
        grad_x, grad_weight = self.conv.backward_both(grad_conv, need_x)
        return grad_x, self._grads(grad_weight[0], torch.addcmul(self.vjp_scale, delta, self.pooled), delta)

    def _grads(self, weight: Tensor, scale: Tensor, shift: Tensor) -> Grads:
        """Gradients of the parameters, from scale's and shift's at each pixel. The bias has no effect."""
        return weight, torch.zeros_like(self.sign), scale.sum(PIXELS).mul_(self.sign), shift.sum(PIXELS)


class GreyBlock:
    """`model.layers.ConvBlock` of grey images, whose norm needs no activations of full size.

    The input is `grey_patches` of the images. With w the kernel summed over its equal channels and Cov the
    covariance of an image's patches, the variance of a channel's outputs is w.Cov.w. So the norm is applied
    to the kernel, in float64: u = r w with r = 1 / sqrt(w.Cov.w + eps). At given maxima of the pool the
    output is linear in the shift and in the kernel s u, s the scale. With t = Cov u, du = r (dw - u (t.dw)).
    """

    def __init__(self, eps: float) -> None:
        self.eps, self.pools = eps, list[MaxPool]()

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        self.x, (self.weight, self.bias, scale, shift) = x, params
        flat = x[..., :9].flatten(1, 2).double()
        self.covariance = _bmm(flat.transpose(1, 2), flat) / flat.shape[1]  # [B, 9, 9]
        w, self.s = self._summed(self.weight), scale.double()[:, None]
        variance = _dot(_bmm(w, self.covariance), w)
        self.r = torch.rsqrt(variance + self.eps)  # [B, C, 1]
        self.u = self.r * w  # [B, C, 9]
        self.t = _bmm(self.u, self.covariance)
        kernel = self._with_shift(self.s * self.u, shift)
        self.pools = []
        self.y = x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(scale))
        for patches, image_kernel, y in zip(*self._chunks(x, kernel, self.y), strict=True):
            self.pools.append(MaxPool())
            torch.clamp_min(self.pools[-1].forward(_responses(patches, image_kernel)), 0, out=y)
        return self.y

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        self.g, grad_shift = self._grad_kernel(grad)
        self.grad_w, self.grad_s = self._through_norm(self.g)
        return None, self._grads(self.s * self.grad_w, self.grad_s, grad_shift)

    def double_backward(self, v_x: Tensor | None, v_params: Grads) -> Tensor:
        v_weight, _, v_scale, v_shift = v_params
        v_w, v_s = self._summed(v_weight), v_scale.double()[:, None]
        t_v = _dot(self.t, v_w)
        v_u = self.r * (v_w - self.u * t_v)
        self.vjp_s = _dot(self.g, v_u)
        t_part = (_dot(self.g, v_w) - 2 * self.grad_s * t_v) * self.t
        t_part += self.grad_s * _bmm(v_w, self.covariance)
        self.vjp_w = (v_s - self.s * self.r * t_v) * self.grad_w - self.s * self.r**2 * t_part
        kernel = self._with_shift(v_s * self.u + self.s * v_u, v_shift)
        parts = zip(self.pools, *self._chunks(self.x, kernel), strict=True)
        selected = torch.cat([pool.select(_responses(patches, of)) for pool, patches, of in parts])
        return _relu_backward(selected, self.y)

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        g, grad_shift = self._grad_kernel(grad)
        grad_w, grad_s = self._through_norm(g)
        return None, self._grads(self.vjp_w + self.s * grad_w, self.vjp_s + grad_s, grad_shift)

    def _summed(self, weight: Tensor) -> Tensor:
        """w, [1, C, 9], of a weight [C, 3, 3, 3]."""
        return weight.sum(1).flatten(1).double()[None]

    def _through_norm(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of w [B, C, 9], before the factor s, and of s [B, C, 1] from g, the kernel's gradient."""
        grad_s = _dot(self.u, g)
        return self.r * (g - self.t * grad_s), grad_s

    def _chunks(self, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
        """Each tensor in chunks of `CHUNK` images; on a GPU whole."""
        size = CHUNK if self.x.device.type == "cpu" else len(self.x)
        return (tensor.split(size) for tensor in tensors)

    def _with_shift(self, kernel: Tensor, shift: Tensor) -> Tensor:
        """Kernels [B, C, 9] with the shift as last column [B, C, 10], which meets the 1 of `grey_patches`."""
        return torch.cat([kernel.to(self.x.dtype), shift.expand(len(kernel), -1)[:, :, None]], 2)

    def _grad_kernel(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the kernels [B, C, 9] and of the shift [C] from the output's."""
        parts = []
        for pool, x, g, y in zip(self.pools, *self._chunks(self.x, grad, self.y), strict=True):
            spread = pool.spread(_relu_backward(g, y)).flatten(1, 2)
            parts.append(_bmm(spread.transpose(1, 2), x.flatten(1, 2)))
        grad_kernel = torch.cat(parts)
        return grad_kernel[:, :, :9].double(), grad_kernel[:, :, 9].sum(0)

    def _grads(self, grad_w: Tensor, grad_s: Tensor, grad_shift: Tensor) -> Grads:
        """Gradients of the parameters; all channels of the weight have the same gradient."""
        weight = grad_w.sum(0).to(self.x.dtype).view(-1, 1, 3, 3).expand_as(self.weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, torch.zeros_like(self.bias), grad_s.sum((0, 2)).to(self.x.dtype), grad_shift


def grey_patches(x: Tensor) -> Tensor:
    """3x3 patches of grey images less their mean, and a 1: [B, 1, H, W] -> [B, H - 2, W - 2, 10]."""
    patches = x[:, 0].unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    return torch.nn.functional.pad(patches - patches.mean((1, 2), keepdim=True), (0, 1), value=1)


def _responses(patches: Tensor, kernel: Tensor) -> Tensor:
    """[B, H, W, K] and a kernel [B, C, K] for each image -> [B, H, W, C]"""
    return _bmm(patches.flatten(1, 2), kernel.transpose(1, 2)).view(*patches.shape[:3], -1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices; for a batch of one as a plain matmul, which is faster."""
    return (a[0] @ b[0])[None] if len(b) == 1 else a @ b


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B, C, K] and [B, C, K] -> [B, C, 1]"""
    return (a * b).sum(2, keepdim=True)


def _relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of the input of a ReLU, from its output `y` and the output's gradient."""
    grad_x: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
    return grad_x


class Autograd:
    """Any function of a tensor and parameters, with autograd's derivatives, for stages of little cost."""

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
        inputs = [self.grad, *self.inputs]
        v_grad, *self.vjp = torch.autograd.grad(self.grads, inputs, v, retain_graph=True, **UNUSED)
        return v_grad

    def backward_both(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Grads]:
        found = torch.autograd.grad(self.y, self.inputs, grad)
        grad_x, *grads = ((one + other).contiguous() for one, other in zip(found, self.vjp, strict=True))
        return grad_x, grads


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
        grad_weight = outer(grad, self.x)
        if self.v_x is not None:
            grad_weight += outer(self.grad, self.v_x)
        grad_x = matmul(grad, self.weight) + matmul(self.grad, self.v_weight) if need_x else None
        return grad_x, (grad_weight, grad.sum(0))


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
        """Gradients of the input, where needed, and of the params; `both`: by the layers' `backward_both`."""
        param_grads: dict[str, Tensor] = {}
        grad_x: Tensor | None = grad
        for k, (layer, names) in reversed(list(enumerate(self.layers))):
            assert grad_x is not None
            grad_x, grads = (layer.backward_both if both else layer.backward)(grad_x, need_x or k > 0)
            param_grads.update(zip(names, grads, strict=True))
        return grad_x if need_x else None, param_grads

    def double_backward(self, v_params: Mapping[str, Tensor]) -> Tensor:
        """Cotangent of the output's gradient from the cotangents of the params' gradients."""
        v: Tensor | None = None
        for layer, names in self.layers:
            v = layer.double_backward(v, [v_params[name] for name in names])
        assert v is not None
        return v
