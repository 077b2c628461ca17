"""The kernels that the networks spend their time in.

All give the numbers of the plain formulation up to rounding and take a shorter way there:

* `conv2d`: a convolution and its two adjoints are three bilinear maps, and the derivative of each is
  made of the other two. Written so, the double backward of the inner loop runs on the same fast kernels
  as the forward pass. (torch's own takes slow paths at batch 1.) Over many images the adjoints are
  those of `winograd`.
* `instance_norm`: its double backward in closed form, a dozen passes where the composed one takes forty.
* `grey_block`: convolution, norm, ReLU and max-pool of a grey image. The norm's statistics follow from
  those of the image's 3x3 patches: so it is the kernel that is normalised, nine values a channel, and the
  full-size activations are never kept.
* `times`: a linear layer's product. A single row meets the weight in the order of memory that Adam does.
* `SharedLinear`, `SharedKernel`: weights that single examples meet one after the other. Their parts of the
  gradient are products of thin factors, which are kept, and added up as few matrix products.

`conv2d`, `grey_block` and `times` can be differentiated to any order, `instance_norm` and products with a
`SharedLinear` twice.

Activations are [B, C, H, W] as everywhere, but lie in memory with the channels last, as do the kernels
of `modelfactory`'s networks: a patch is then a few long runs of memory, and whatever treats channels
alike runs along them. Other layouts give the same numbers, slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fast import winograd
from model.fast.matmul import multiply

# Output positions of a batch up to which a convolution on the CPU is a product with a matrix of patches,
# faster than torch's convolution.
FEW_POSITIONS = 256
MANY_CHANNELS = 128  # from which on `winograd`'s transforms cost less than its products save
CHUNK = 4  # images whose full-size activations exist at a time, few enough to stay in cache


def conv2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """3x3 convolution without padding or bias: [B, I, H, W] and [O, I, 3, 3] -> [B, O, H', W']."""
    if isinstance(weight, StandIn):
        weight.shared.stride = stride
        return weight.shared.forward(x)
    y: Tensor = _Conv.apply(x, weight, stride)
    return y


class _Conv(torch.autograd.Function):
    """y = F(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        if x.device.type != "cpu":
            return F.conv2d(x, weight, stride=stride)
        if not _few_positions(x, stride):
            # The CPU's channels-last kernel adds up 9 * I products one after the other, the other one in
            # blocks: a third of the rounding error, and with it of the decisions of ReLU and max-pool
            # that float32 gets wrong.
            y = F.conv2d(x.contiguous(), weight.contiguous(), stride=stride)
            return y.contiguous(memory_format=torch.channels_last)
        rows = multiply(_patch_rows(x, stride), _kernel_rows(weight).t())
        return _image(rows, *_output_size(x, stride))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        if _many(x, weight, ctx.stride) and need_x and need_weight and not torch.is_grad_enabled():
            return *winograd.adjoints(grad, x, weight), None  # less work than one by one
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
        return _adjoints(grad, like, weight, stride, need_weight=False)[0]

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
            return _adjoints(grad, x, like, stride, need_x=False)[1]
        # In the shares of Adam's pass, which comes next at meta-test.
        errors, patches = _last(grad).flatten(0, 2).t(), _patch_rows(x, stride)
        blocks = errors.unflatten(0, _shares(errors))
        return _kernel_of_rows(torch.bmm(blocks, patches.expand(len(blocks), -1, -1)).flatten(0, 1))

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


def _image(rows: Tensor, height: int, width: int) -> Tensor:
    """Rows of channels, position after position, as [B, C, H, W]."""
    return rows.view(-1, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


def _kernel_rows(weight: Tensor) -> Tensor:
    """A kernel [O, I, 3, 3] as the matrix [O, 9 * I] that multiplies patches, a view of it."""
    return _last(weight).flatten(1)


def _kernel_of_rows(rows: Tensor) -> Tensor:
    """The inverse of `_kernel_rows`."""
    return _image(rows.view(len(rows), 9, -1), 3, 3)


def _output_size(x: Tensor, stride: int) -> tuple[int, int]:
    return (x.shape[2] - 3) // stride + 1, (x.shape[3] - 3) // stride + 1


def _few_positions(x: Tensor, stride: int) -> bool:
    height, width = _output_size(x, stride)
    return x.device.type == "cpu" and len(x) * height * width <= FEW_POSITIONS


def _many(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether there is enough of everything for `winograd`."""
    many = x.device.type == "cpu" and not _few_positions(x, stride)
    return many and stride == 1 and min(weight.shape[:2]) >= MANY_CHANNELS


def _patch_rows(x: Tensor, stride: int) -> Tensor:
    """The 3x3 patches of [B, C, H, W], one row of length 9 * C for each output position."""
    patches = _last(x).unfold(1, 3, stride).unfold(2, 3, stride)  # [B, H', W', C, 3, 3]
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])


def _adjoints(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's input and kernel; without meaning where not needed."""
    if _many(x, weight, stride):
        return winograd.adjoints(grad, x, weight, need_x, need_weight)
    if not need_weight and _few_positions(x, stride):
        patches = multiply(_last(grad).flatten(0, 2), _kernel_rows(weight))
        patches = patches.view(len(x), *_output_size(x, stride), 3, 3, -1)
        to_x = winograd.add_up(patches, stride, (x.shape[2], x.shape[3]))
        return to_x.permute(0, 3, 1, 2), x.new_empty(0)
    needed = (need_x, need_weight, False)
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, needed
    )
    return to_x, to_weight


def instance_norm(x: Tensor, sign: Tensor, eps: float) -> Tensor:
    """Normalise each sample and channel by its own statistics over H x W, with the sign asked for.

    Args:
        x: [B, C, H, W].
        sign: [C], 1 or -1 by which to multiply.
        eps: added to the biased variance.
    """
    z: Tensor = _Norm.apply(_last(x).flatten(1, 2), sign, eps)
    return _image(z, x.shape[2], x.shape[3])


class _Norm(torch.autograd.Function):
    """The norm of [B, P, C] over P: z = (x - mean) * r with r = sign / std."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: Tensor, eps: float) -> Tensor:
        z = x - x.mean(1, keepdim=True)
        r = torch.rsqrt((z * z).mean(1, keepdim=True) + eps) * sign
        z *= r
        ctx.save_for_backward(x, z, r)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _NormSlope.apply(grad, *ctx.saved_tensors), None, None


class _NormSlope(torch.autograd.Function):
    """Gradient of x from g, that of z: with means over P, r * (g - mean(g) - z * mean(g z)).

    z and r are functions of x, of which dz = r * (dx - mean(dx) - z * mean(z dx)) and
    dr = -r * r * mean(z dx).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, z: Tensor, r: Tensor) -> Tensor:
        mean_g, mean_gz = g.mean(1, keepdim=True), (g * z).mean(1, keepdim=True)
        ctx.save_for_backward(g, z, r, mean_g, mean_gz)
        slope = torch.addcmul(mean_g, z, mean_gz)
        return torch.sub(g, slope, out=slope).mul_(r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of g and x from v, that of the result."""
        g, z, r, mean_g, mean_gz = ctx.saved_tensors
        mean_v, mean_vz = v.mean(1, keepdim=True), (v * z).mean(1, keepdim=True)
        along_z = (v * g).mean(1, keepdim=True) - mean_v * mean_g - 3 * mean_vz * mean_gz
        mean = mean_vz * mean_g + mean_gz * mean_v
        to_x = torch.addcmul(-mean, z, along_z).addcmul_(g, mean_vz).addcmul_(v, mean_gz).mul_(-r * r)
        to_g = torch.addcmul(mean_v, z, mean_vz)
        return torch.sub(v, to_g, out=to_g).mul_(r), to_x, None, None


def signs(scale: Tensor) -> Tensor:
    """1 or -1. With it, scale and shift may follow max-pool: where the scale is negative, the largest of
    the results is that of the smallest value."""
    return torch.ones_like(scale).copysign(scale.detach())


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
    patches = x[:, 0].unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)  # [B, H', W', 9]
    patches = patches - patches.mean((1, 2), keepdim=True)
    precise = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    flat = patches.flatten(1, 2).to(precise)
    covariance = flat.transpose(1, 2) @ flat / flat.shape[1]
    kernel = _NormalisedKernel.apply(weight.flatten(1), scale, covariance, eps)
    kernel = torch.cat([kernel, shift.expand(len(x), -1)[:, :, None]], 2)
    y: Tensor = _MaxConv.apply(kernel, F.pad(patches, (0, 1), value=1))  # the shift's input is 1
    return y


class _NormalisedKernel(torch.autograd.Function):
    """w * scale / sqrt(w.Cov.w + eps) for each row w: [C, 9], [C] and [B, 9, 9] -> [B, C, 9].

    Of so many small operations autograd's record costs too: composed, they take a meta-step 2 % more time.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, covariance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight, scale, covariance)
        ctx.eps = eps
        wide = weight.to(covariance.dtype)
        _, inverse = _deviations(wide, covariance, eps)
        return (wide * (inverse * scale)[:, :, None]).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, scale, covariance = ctx.saved_tensors
        wide, grad = weight.to(covariance.dtype), grad.to(covariance.dtype)
        towards, inverse = _deviations(wide, covariance, ctx.eps)
        along = (grad * wide).sum(2) * inverse
        factor = inverse * scale
        to_weight = grad * factor[:, :, None] - towards * (along * factor * inverse)[:, :, None]
        return to_weight.sum(0).to(weight.dtype), along.sum(0).to(scale.dtype), None, None


def _deviations(weight: Tensor, covariance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Cov.w, half of the variance's gradient, and 1 / sqrt(w.Cov.w + eps): [B, C, 9] and [B, C]."""
    towards = weight @ covariance
    return towards, ((towards * weight).sum(2) + eps).rsqrt()


class _MaxConv(torch.autograd.Function):
    """relu(max k.u) over windows of 2 x 2 positions: [B, C, K] and [B, H, W, K] -> [B, C, H / 2, W / 2].

    Each image's patches u meet a kernel k of its own. The derivative is that of the winning position, the
    first of equals.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor) -> Tensor:
        batch, height, width, _ = patches.shape
        y = _image(patches.new_empty(batch * height * width // 4, kernel.shape[1]), height // 2, width // 2)
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
    """Gradient of the kernels from that of their answers y: [B, C, H / 2, W / 2] -> [B, C, K]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, patches: Tensor, winners: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(patches, winners, y)
        slopes = []
        for g, part, won, answer in _chunks(grad, patches, winners, y):
            passed = torch.ops.aten.threshold_backward(g, answer, 0)
            like = g.new_empty(*part.shape[:3], g.shape[1]).permute(0, 3, 1, 2)
            spread = torch.ops.aten.max_pool2d_with_indices_backward(
                passed, like, [2, 2], [2, 2], [0, 0], [1, 1], False, won.long()
            )
            slopes.append(part.flatten(1, 2).transpose(1, 2) @ _last(spread).flatten(1, 2))
        return torch.cat(slopes).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        return _Select.apply(v, *ctx.saved_tensors), None, None, None


class _Select(torch.autograd.Function):
    """What other kernels answer where those of y did: [B, C, K] -> [B, C, H / 2, W / 2]."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, patches: Tensor, winners: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(patches, winners, y)
        chosen = [
            _last(_responses(*parts)).flatten(1, 2).gather(1, _last(won).flatten(1, 2).long())
            for *parts, won in _chunks(kernel, patches, winners)
        ]
        answers = _image(torch.cat(chosen), *y.shape[2:])
        passed: Tensor = torch.ops.aten.threshold_backward(answers, y, 0)
        return passed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None, None


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`CHUNK` images of each at a time."""
    return zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)


def _responses(kernel: Tensor, patches: Tensor) -> Tensor:
    """k.u for every position: [B, C, K], [B, H, W, K] -> [B, C, H, W]."""
    return _image(patches.flatten(1, 2) @ kernel.transpose(1, 2), *patches.shape[1:3])


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, [B, K] and [K, N], where the matrix is a weight's or its transpose."""
    y: Tensor = _Times.apply(x, matrix)
    return y


class _Times(torch.autograd.Function):
    """x @ matrix, of which both derivatives are products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return _row_times(x, matrix) if len(x) == 1 else multiply(x, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, matrix = ctx.saved_tensors
        need_x, need_matrix = ctx.needs_input_grad
        to_matrix = None
        if need_matrix:  # laid out as `matrix` is, a weight's transpose
            to_matrix = (grad.t() * x if len(x) == 1 else times(grad.t(), x)).t()
        return times(grad, matrix.t()) if need_x else None, to_matrix


def _row_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for a single row, on the CPU in the shares of `_shares`."""
    if x.device.type != "cpu":
        return x @ matrix
    if matrix.stride(0) > 1:  # the weight itself, not its transpose
        shares = _shares(matrix)
        return torch.bmm(x.unflatten(1, shares).transpose(0, 1), matrix.unflatten(0, shares)).sum(0)
    # As matrix times column, a third faster than as row times matrix.
    blocks = matrix.t().unflatten(0, _shares(matrix.t()))
    return torch.bmm(blocks, x.t().expand(len(blocks), -1, -1)).view(1, -1)


def _shares(weight: Tensor) -> tuple[int, int]:
    """How the threads divide the rows of a weight: number and size of their blocks.

    A pass over all weights, as Adam's, gives each thread the same stretch of memory every time. Where
    products keep to that, a thread finds what it has written in its own cache. Cores need not share one
    (those of some processors do in groups): what another has just written then takes several times as
    long to read as what lies in memory.
    """
    number = math.gcd(len(weight), torch.get_num_threads()) if weight.device.type == "cpu" else 1
    return number, len(weight) // number


class SharedLinear:
    """A weight [O, K] that few rows meet at a time, forwards and transposed, many times in a graph.

    Multiplying by the tensor itself would give as many gradients of its full size to add up. Here each
    product leaves the two factors of its part, errors [P, O] and inputs [P, K], in a list; sums are
    formed where they are needed. Autograd sees an empty tensor in place of the weight, the token, which
    every product depends on and through which it orders the work.

    Attributes:
        weight: the value now.
        token: what to differentiate with respect to, to have the factors of the gradient left here.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.slope: Tensor | None = None  # gradient of the weight as it is after the latest products
        tracked = weight.requires_grad and torch.is_grad_enabled()
        self.token = _Origin.apply(weight, self) if tracked else weight.new_empty(0, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T: [P, K] -> [P, O]."""
        product: Tensor = _Product.apply(x, self.token, self.weight, self, None)
        return product

    def transposed(self, y: Tensor) -> Tensor:
        """y @ weight: [P, O] -> [P, K]."""
        product: Tensor = _Product.apply(y, self.token, self.weight, self, y)
        return product

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The map, with a weight of the caller's."""
        return multiply(x, weight.t())

    def adjoint(self, y: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """Its adjoint, with the shape of `like`."""
        return multiply(y, weight)

    def rows(self, errors: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [P, O] and [P, K] whose product, `errors.T @ inputs`, is the gradient of `matrix`."""
        return errors, inputs

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [O, K], a view of it."""
        return weight

    def of_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`, a view."""
        return matrix

    def step(self, lr: float) -> None:
        """One SGD step along the gradient whose factors the latest backward pass has left here."""
        errors, inputs = self.factors.pop()
        left, right = self.rows(errors.detach(), inputs.detach())
        self.weight = self.of_matrix(multiply(left.t() * -lr, right, plus=self.matrix(self.weight)))
        if self.token.grad_fn is not None:  # else no gradient passes through steps (first order)
            self.token = _Step.apply(errors, inputs, self.token, self, lr)

    def result(self) -> Tensor:
        """The weight as a tensor like any other; nothing may follow."""
        result: Tensor = _Result.apply(self.release(), self)
        return result

    def release(self) -> Tensor:
        """The token, for the last time. The graph refers to this object, and would keep itself and all
        that lies here alive if this object referred to the graph."""
        token = self.token
        del self.token
        return token

    def gradient(self) -> Tensor:
        """Sum of all factors so far and of the gradient that came from later on."""
        if self.slope is None:
            self.slope = torch.zeros_like(self.weight)
        if self.factors:
            left, right = self.rows(*(torch.cat(part) for part in zip(*self.factors, strict=True)))
            self.slope = self.of_matrix(multiply(left.t(), right, plus=self.matrix(self.slope)))
            self.factors.clear()
        return self.slope


class SharedKernel(SharedLinear):
    """The same for a kernel [O, I, 3, 3], channels last, that images meet: [B, I, H, W] -> [B, O, H', W']."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.contiguous(memory_format=torch.channels_last))
        self.stride = 1  # `conv2d` sets it

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv2d(x, weight, self.stride)

    def adjoint(self, y: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        return _adjoints(y, like, weight, self.stride, need_weight=False)[0]

    def rows(self, errors: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return _last(errors).flatten(0, 2), _patch_rows(inputs, self.stride)

    def matrix(self, weight: Tensor) -> Tensor:
        return _kernel_rows(weight)

    def of_matrix(self, matrix: Tensor) -> Tensor:
        return _kernel_of_rows(matrix)

    def stand_in(self) -> StandIn:
        """What the layers take for their weight, so that they multiply by this one."""
        kernel: StandIn = Tensor._make_subclass(StandIn, self.weight)
        kernel.shared = self
        return kernel


class StandIn(Tensor):
    """A kernel that leads `conv2d` to a `SharedKernel`."""

    shared: SharedKernel


class _Origin(torch.autograd.Function):
    """The token of an initial weight: autograd comes here after all products and steps."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shared: SharedLinear) -> Tensor:
        ctx.shared = shared
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.shared.gradient(), None


class _Step(torch.autograd.Function):
    """The token after weight - lr * errors.T @ inputs; all products with the new weight are behind it."""

    @staticmethod
    def forward(
        ctx: Any, errors: Tensor, inputs: Tensor, token: Tensor, shared: SharedLinear, lr: float
    ) -> Tensor:
        ctx.save_for_backward(errors, inputs, token)
        ctx.shared, ctx.lr = shared, lr
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        errors, inputs, token = ctx.saved_tensors
        slope = ctx.shared.gradient()
        to_inputs = None
        if ctx.needs_input_grad[1]:
            to_inputs = -ctx.lr * ctx.shared.adjoint(errors, slope, inputs)
        return -ctx.lr * ctx.shared.product(inputs, slope), to_inputs, token, None, None


class _Result(torch.autograd.Function):
    """The weight behind a token."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, shared: SharedLinear) -> Tensor:
        ctx.save_for_backward(token)
        ctx.shared = shared
        return shared.weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.shared.slope = torch.empty_like(ctx.shared.weight).copy_(grad)
        return ctx.saved_tensors[0], None


class _Product(torch.autograd.Function):
    """The map or, shaped like `like`, its adjoint; the backward leaves factors of the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, weight: Tensor, shared: SharedLinear, like: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, token, weight)
        ctx.shared, ctx.adjoint = shared, like is not None
        return shared.product(x, weight) if like is None else shared.adjoint(x, weight, like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, token, weight = ctx.saved_tensors
        ctx.shared.factors.append((x, grad) if ctx.adjoint else (grad, x))
        slope = None
        if ctx.needs_input_grad[0]:
            like = None if ctx.adjoint else x.detach()
            slope = _Product.apply(grad, token, weight, ctx.shared, like)
        return slope, token, None, None, None
