"""The fast layers against their plain twins, and what they are made of against torch's own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.func import functional_call

from model.fast import conv as kernels
from model.fast import matmul as products
from model.fast import winograd
from model.fast.conv import FEW_POSITIONS, conv2d
from model.fast.first_block import grey_block
from model.fast.layers import FastConv2d, FastConvBlock, FastLinear, use_fast_layers
from model.fast.matmul import linear, matmul
from model.fast.norm import norm_relu_pool
from model.layers import ConvBlock, colour

# For the tests: fewer than the kernels' own, which take seconds in float64.
MANY_CHANNELS = 32
CHUNK = 190

# batch, inputs, outputs, height, width, stride; the first few as a product of patches, then by
# Winograd's adjoints in one and in several chunks, with whole and cut tiles, then torch's own.
SIZES = [
    (1, 32, 40, 13, 13, 1),
    (1, 3, 5, 8, 9, 2),
    (40, 32, 40, 5, 5, 1),
    (50, 32, 33, 13, 13, 1),
    (35, 40, 32, 10, 15, 1),
    (300, 32, 32, 3, 4, 1),
    (40, 8, 33, 13, 13, 1),
    (40, 32, 32, 13, 13, 2),
]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(
        dtype
    )


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def compare(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def derivatives(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Value, gradients (together and one by one) of a loss, and gradients of these, also by the loss."""
    y = function(*inputs)
    factors = normal(*y.shape).requires_grad_()
    # Not linear, so that gradients depend on all inputs, and steep at zero, where ReLU lets nothing through.
    loss = ((y + 1).square() * factors).sum()
    apart = [torch.autograd.grad(loss, z, retain_graph=True)[0] for z in inputs]
    slopes = torch.autograd.grad(loss, inputs, create_graph=True)
    # Flipped, lest it be an input again, which may be the one direction that nothing depends on.
    overlap = torch.stack([(slope * normal(*slope.shape).flip(-1)).sum() for slope in slopes]).sum()
    return y, *apart, *slopes, *torch.autograd.grad(overlap, [*inputs, factors])


@pytest.mark.parametrize("lay", [channels_last, Tensor.contiguous])
@pytest.mark.parametrize("size", SIZES)
def test_convolution(
    size: tuple[int, ...], lay: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MANY_CHANNELS", MANY_CHANNELS)
    monkeypatch.setattr(winograd, "CHUNK", CHUNK)
    batch, inputs, outputs, height, width, stride = size
    x = lay(normal(batch, inputs, height, width)).requires_grad_()
    weight = lay(normal(outputs, inputs, 3, 3)).requires_grad_()
    ours = derivatives(lambda x, weight: conv2d(x, weight, stride), x, weight)
    compare(ours, derivatives(lambda x, weight: F.conv2d(x, weight, stride=stride), x, weight), 1e-11)


def test_sizes_reach_every_way() -> None:
    """The list above covers what it says."""
    positions = [b * ((h - 3) // s + 1) * ((w - 3) // s + 1) for b, _, _, h, w, s in SIZES]
    assert [p <= FEW_POSITIONS for p in positions] == [True] * 2 + [False] * 6
    assert [min(size[1:3]) >= MANY_CHANNELS for size in SIZES[2:]] == [True] * 4 + [False, True]
    tiles = [b * -(-(h - 2) // 4) * -(-(w - 2) // 4) for b, _, _, h, w, _ in SIZES[2:6]]
    assert min(tiles) < CHUNK < max(tiles)


def test_adjoints_err_by_rounding_in_single_precision() -> None:
    """Published sizes; what is cut off is known from float64."""
    for channels, height in ((256, 13), (112, 13), (256, 5)):
        x, grad = normal(8, channels, height, height), normal(8, channels, height - 2, height - 2)
        weight = normal(channels, channels, 3, 3)
        exact = winograd.gradients(grad, x, weight)
        single = winograd.gradients(grad.float(), x.float(), weight.float())
        for one, other in zip(single, exact, strict=True):
            assert (one - other).square().mean() <= (2e-6) ** 2 * other.square().mean()


def test_adjoints_one_at_a_time() -> None:
    x, grad, weight = normal(40, 32, 13, 13), normal(40, 33, 11, 11), normal(33, 32, 3, 3)
    both = winograd.gradients(grad, x, weight)
    assert torch.equal(winograd.gradients(grad, x, weight, need_weight=False)[0], both[0])
    assert torch.equal(winograd.gradients(grad, x, weight, need_x=False)[1], both[1])


@pytest.mark.parametrize("pool", [False, True])
def test_norm_relu_and_pool(pool: bool) -> None:
    inputs = [
        part.requires_grad_() for part in (channels_last(normal(3, 6, 7, 4)), normal(6), normal(2, 6)[0])
    ]
    assert set(inputs[1].detach().sign().tolist()) == {1, -1}

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.relu(F.instance_norm(x, None, None, weight, bias))
        return F.max_pool2d(y, 2) if pool else y

    ours = derivatives(lambda x, weight, bias: norm_relu_pool(x, weight, bias, 1e-5, pool), *inputs)
    compare(ours, derivatives(plain, *inputs), 1e-11)


def twins(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer with random parameters in float64, and the same in its fast form."""
    layer = layer.double()
    for position, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape) + position / 10
    fast = nn.Sequential(copy.deepcopy(layer))
    use_fast_layers(fast)
    return layer, fast[0]


@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (ConvBlock(4, 6, pool=True), FastConvBlock, (3, 4, 9, 8)),
        (ConvBlock(3, 6, pool=True), FastConvBlock, (3, 1, 12, 10)),  # grey: the first block
        (ConvBlock(3, 6, pool=True), FastConvBlock, (3, 1, 11, 10)),
        (ConvBlock(4, 6, pool=False), FastConvBlock, (1, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2), FastConv2d, (2, 4, 9, 8)),
        (nn.Conv2d(3, 6, 3), FastConv2d, (2, 1, 9, 8)),
        (nn.Conv2d(4, 6, 3, bias=False), FastConv2d, (1, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), FastConv2d, (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), FastConv2d, (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, (3, 1), dilation=(2, 1)), FastConv2d, (2, 4, 9, 8)),
        (nn.Linear(8, 6), FastLinear, (2, 8)),
        (nn.Linear(8, 6, bias=False), FastLinear, (1, 8)),
        (nn.Linear(8, 6), FastLinear, (2, 3, 8)),
    ],
)
def test_layers(layer: nn.Module, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    """The same output, state dict and derivatives, whatever the layer is asked for."""
    plain, fast = twins(layer)
    assert type(fast) is kind
    assert plain.state_dict().keys() == fast.state_dict().keys()
    names = [name for name, _ in plain.named_parameters() if name != "conv.bias"]  # without effect
    x = normal(*shape)
    x = colour(x)
    parts = [plain.get_parameter(name).detach().clone().requires_grad_() for name in names]
    parts = parts if shape[1] == 1 else [x.requires_grad_(), *parts]

    def call(module: nn.Module) -> Callable[..., Tensor]:
        def output(*values: Tensor) -> Tensor:
            image, weights = (x, values) if shape[1] == 1 else (values[0], values[1:])
            y: Tensor = functional_call(module, dict(zip(names, weights, strict=True)), (image,))
            return y

        return output

    compare(derivatives(call(fast), *parts), derivatives(call(plain), *parts), 1e-10)


def test_layers_of_other_types_stay_as_they_are() -> None:
    """What somebody has made of a layer is not ours to replace."""

    class Other(nn.Linear):
        """Anything."""

    net = nn.Sequential(Other(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    kinds = [type(module) for module in net]
    use_fast_layers(net)
    assert [type(module) for module in net] == [*kinds[:2], FastLinear]


@pytest.mark.parametrize("size", [(3, 1, 12, 10), (1, 1, 184, 186)])
def test_grey_block(size: tuple[int, ...]) -> None:
    """Images of usual size, and one with more positions than 16 bits tell apart."""
    x, weights = normal(*size), (normal(6, 1, 3, 3), normal(6), normal(1, 6)[0])
    weights[1][weights[2].argmax()] = 0  # a channel whose positions are all equal: the first one wins
    inputs = [part.requires_grad_() for part in weights]

    def plain(weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.instance_norm(F.conv2d(x, weight), None, None, scale, shift)), 2)

    ours = derivatives(lambda weight, scale, shift: grey_block(x, weight, scale, shift, 1e-5), *inputs)
    compare(ours, derivatives(plain, *inputs), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2])
def test_products_of_a_layer(rows: int, dtype: torch.dtype) -> None:
    x, matrix = normal(rows, 300, dtype=dtype), normal(300, 50).to(dtype)
    compare((linear(x, matrix),), (x.double() @ matrix.double(),), 1e-6 if dtype == torch.float32 else 1e-13)
    compare((linear(x, matrix.t().contiguous().t()),), (linear(x, matrix),), 1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lay", [Tensor.contiguous, lambda matrix: matrix.t().contiguous().t()])
def test_derivatives_of_a_layers_product(lay: Callable[[Tensor], Tensor], rows: int) -> None:
    x, matrix = normal(rows, 30).requires_grad_(), lay(normal(30, 20)).requires_grad_()
    compare(derivatives(linear, x, matrix), derivatives(torch.matmul, x, matrix), 1e-12)


@pytest.fixture(params=["oneDNN", "BLAS"])
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """What multiplies: oneDNN where torch has it, and torch's own choice as if there were none."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and request.param == "oneDNN")
    yield request.param
    torch._C._set_mkldnn_enabled(before)


def views(matrix: Tensor) -> Iterator[Tensor]:
    """The same matrix in all ways to lie in memory: by rows, by columns, with gaps."""
    yield matrix
    yield matrix.t().contiguous().t()
    yield matrix.repeat_interleave(2, 1)[:, ::2]
    yield torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_matrices(library: str, dtype: torch.dtype) -> None:
    a, b = (normal(*size).to(dtype) for size in ((40, 70), (70, 30)))
    exact, tolerance = a.double() @ b.double(), 1e-6 if dtype == torch.float32 else 1e-13
    for left, right in itertools.product(views(a), views(b)):
        compare((matmul(left, right),), (exact,), tolerance)


def test_onednn_multiplies_where_torch_has_it(library: str) -> None:
    there = torch.backends.mkldnn.is_available() and library == "oneDNN"
    assert products._by_onednn(normal(2, 2).float()) == there
    assert not products._by_onednn(normal(2, 2))


def test_operators_that_changed_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no public name: a torch without them, or with other arguments, multiplies as it did."""

    def changed(*_: object) -> Tensor:
        raise RuntimeError("no overload takes these arguments")

    monkeypatch.setattr(products, "_onednn", changed)
    products._has_onednn.cache_clear()
    try:
        a = normal(2, 3).float()
        assert torch.equal(matmul(a, a.t()), a @ a.t())
    finally:
        products._has_onednn.cache_clear()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_products_in_the_shares_of_any_number_of_threads(threads: int) -> None:
    """Rows of the weight that a number of threads divides evenly, in part and not at all."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = channels_last(normal(1, 4, 6, 5)).requires_grad_(), normal(6, 4, 3, 3).requires_grad_()
        compare(derivatives(conv2d, x, weight), derivatives(F.conv2d, x, weight), 1e-11)
        row, matrix = normal(1, 8), normal(8, 6)
        compare(
            (linear(row, matrix), linear(row[:, :6], matrix.t())),
            (row @ matrix, row[:, :6] @ matrix.t()),
            1e-13,
        )
    finally:
        torch.set_num_threads(before)
