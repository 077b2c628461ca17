"""The fast backend: its products and its guard. (Its numbers: `test_own_networks.py`.)"""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import method
from model.check import Use
from model.fast import BACKENDS, FAST, choose_backend, matmul, winograd
from model.guard import difference
from model.method import InnerLoop, Params
from model.modelfactory import Network, build, trained_parameters
from tests.model.test_method import CPU, WIDTHS, network
from utils.errors import UserError


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def assert_equal(ours: object, theirs: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-3 * tolerance)


def test_winograd_errs_by_rounding_in_single_precision() -> None:
    """At published sizes."""
    for channels, height in ((256, 13), (112, 5)):
        x, grad = normal(4, height, height, channels), normal(4, height - 2, height - 2, channels)
        weight = normal(channels, channels, 3, 3)
        exact = winograd.gradients(grad, x, weight)
        single = winograd.gradients(grad.float(), x.float(), weight.float())
        for one, other in zip(single, exact, strict=True):
            assert (one - other).square().mean() <= (2e-6) ** 2 * other.square().mean()


def test_products_with_and_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator has no public name, and a later torch may take other arguments."""
    a, b = normal(40, 70).float(), normal(70, 30).float()
    assert matmul._by_onednn(a) == torch.backends.mkldnn.is_available()
    assert_equal(matmul.matmul(a, b).double(), a.double() @ b.double(), 1e-4)
    monkeypatch.setattr(matmul, "_onednn", lambda: None)
    monkeypatch.setattr(matmul, "_has_onednn", matmul._has_onednn.__wrapped__)
    assert_equal(matmul.matmul(a, b), a @ b, 0)


@pytest.mark.parametrize("threads", [1, 2, 4, 7])
def test_products_of_a_row(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the weight that a number of threads divides evenly, in part and not at all."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    row, weight = normal(1, 8), normal(6, 8)
    assert_equal(matmul.matmul(row, weight.t()), row @ weight.t(), 1e-13)
    assert_equal(matmul.matmul(row[:, :6], weight), row[:, :6] @ weight, 1e-13)


def test_images_of_more_pixels_than_16_bits_tell_apart() -> None:
    net = build("sANML", {"pln_channels": 2, "num_classes": 4}, torch.Generator().manual_seed(0), 184)
    assert difference(net, CPU, Use(update_step=2), FAST) is None


def test_nothing_is_differentiated_twice() -> None:
    """An error in place of gradients that miss a term."""
    net = network("ANML", "fast")[0]
    params: Params = {name: net.get_parameter(name) for name in trained_parameters(net, 7)}
    examples = normal(2, 1, 28, 28), torch.tensor([3, 3])
    with pytest.raises(RuntimeError, match="differentiable once"):
        method.meta_loss(net, params, examples, examples, InnerLoop(0.1))
    frozen = net.frozen(examples[0], params), examples[1]
    loss, _, _ = BACKENDS["fast"].meta_loss(net, params, frozen, frozen, InnerLoop(0.1))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, list(params.values()), create_graph=True)


@pytest.mark.parametrize("options", [{}, {"options": {"optimizer": "sgd"}, "channels": 3, "rln": 0}])
@pytest.mark.parametrize("kind", WIDTHS)
def test_the_guard_lets_equal_numbers_pass(kind: str, options: dict[str, Any]) -> None:
    for steps in (0, 1):
        net = network(kind)[0].float()
        before = copy.deepcopy(net.state_dict())
        use = Use(inner=InnerLoop(0.1, steps), update_step=3, **options)
        chosen = choose_backend("auto", [net], CPU, use)
        assert chosen.name == "fast", chosen.why
        assert_equal(net.state_dict(), before, 0)


def put(name: str, module: nn.Module) -> Callable[[Network], None]:
    return lambda net: net.set_submodule(name, module)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda net: net.register_forward_hook(lambda *_: None), "hooks"),
        (lambda net: net.pln.register_forward_pre_hook(lambda *_: None), "hooks"),
        (lambda net: setattr(net.nm.gate, "bias", net.pln.block1.norm.bias), "fails"),
        (put("pln.block2.conv", nn.Conv2d(6, 6, 3, groups=2)), "fails"),
        (put("pln.block2.norm", nn.GroupNorm(2, 6)), "other numbers"),
        (put("head", nn.Linear(54, 12, bias=False)), "head"),
        (put("head", nn.Sequential(nn.Linear(54, 12))), "head"),
        (lambda net: setattr(net, "__class__", type("Other", (type(net),), {})), "ANML, sANML and OML alone"),
    ],
)
def test_networks_that_the_fast_backend_does_not_know(change: Callable[[Network], None], says: str) -> None:
    net = network("ANML")[0]
    change(net)
    why = choose_backend("auto", [net], CPU, Use(update_step=3)).why
    assert re.search(says, why), why
    assert "\n" not in why
    with pytest.raises(UserError, match=f"--backend fast: .*{says}"):
        choose_backend("fast", [net], CPU, Use(update_step=3))
