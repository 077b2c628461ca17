"""Derivatives written out against autograd's of the plain layers, and where they step aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.fast.chain import Chain, entering
from model.fast.features import ChainFeatures, FeaturesByAutograd, features_of
from model.fast.head import _HandLearner, adam_learner
from model.fast.layers import use_fast_layers
from model.layers import colour
from model.learner import Settings
from model.meta_test import new_run
from model.method import OnlineLearner
from model.modelfactory import Network, build, trained_parameters
from model.optimizer import OPTIMIZERS
from tests.model.test_method import WIDTHS, differentiate, images

CUTS = [(kind, rln) for kind, layers in {"ANML": 14, "sANML": 7, "OML": 8}.items() for rln in range(layers)]
SMALL = {**WIDTHS, "sANML": {"pln_channels": 6, "num_classes": 12}}


def network(kind: str, fast: bool = True) -> Network:
    """A small network in float64 of whose norms some scales are negative."""
    generator = torch.Generator().manual_seed(0)
    net = build(kind, SMALL[kind], generator).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    if fast:
        use_fast_layers(net)
    return net


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def stages_of(net: Network, chain: str) -> list[nn.Module]:
    return list(net.get_submodule(chain).children())


def run(stages: list[nn.Module], x: Tensor, params: list[Tensor]) -> Tensor:
    """Stages with other parameters than their own."""
    given = iter(params)
    for stage in stages:
        own = {name: next(given) for name, _ in stage.named_parameters()}
        x = functional_call(stage, own, (x,)) if own else stage(x)
    return x


@pytest.mark.parametrize(
    ("kind", "chain", "first"),
    [("ANML", "nm", 0), ("ANML", "pln", 0), ("ANML", "nm", 1), ("ANML", "nm", 4), ("OML", "body", 13)],
)
def test_all_derivatives(kind: str, chain: str, first: int) -> None:
    """Of the output and of the gradients: whole chains, and those whose first stages are frozen."""
    plain = stages_of(network(kind, fast=False), chain)
    before, stages = plain[:first], plain[first:]
    fast = stages_of(network(kind), chain)[first:]
    pixels = colour(images(3))
    x = run(before, pixels, [p.detach() for stage in before for p in stage.parameters()])
    params: list[Tensor] = [parameter for stage in stages for parameter in stage.parameters()]
    known = [parameter.detach() for parameter in params]
    ours = Chain(fast, grey=first == 0)

    y = run(stages, x[1:2], params)
    torch.testing.assert_close(ours.forward(entering(x)[1], known), y.detach())
    grad = normal(*y.shape).requires_grad_()
    grads = torch.autograd.grad(y, params, grad, create_graph=True, allow_unused=True, materialize_grads=True)
    own = ours.backward(grad.detach())
    torch.testing.assert_close(list(own), [g.detach() for g in grads])
    assert [g.stride() for g in own] == [p.stride() for stage in fast for p in stage.parameters()]

    factors, slope = [normal(*p.shape) for p in params], normal(*y.shape).flip(1)
    together = sum((g * f).sum() for g, f in zip(grads, factors, strict=True)) + (y * slope).sum()
    expected = torch.autograd.grad(
        together,
        [grad, *params],
        allow_unused=True,
        materialize_grads=True,
    )
    found = [ours.double_backward(factors), *ours.backward_both(slope)]
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-12)


def test_without_a_derivative_of_gradients_there_is_nothing_left() -> None:
    stages = stages_of(network("sANML"), "pln")
    chain, x = Chain(stages, grey=True), entering(colour(images(1)))[0]
    params = [parameter.detach() for stage in stages for parameter in stage.parameters()]
    grad = normal(*chain.forward(x, params).shape)
    torch.testing.assert_close(chain.backward_both(grad), chain.backward(grad))


@pytest.mark.parametrize(("kind", "rln"), CUTS)
def test_a_trajectory_is_that_of_autograd(kind: str, rln: int) -> None:
    """The meta-gradient in both orders, at every cut, of images in colour and grey."""
    query = normal(6, 3, 28, 28) if rln % 2 else images(6)
    labels = torch.tensor([0, 5, 7, 3, 3, 7])
    for first_order in (False, True):
        plain, fast = (
            differentiate(
                network(kind, backend == "fast"),
                *(query, labels, 3, rln, 0.03, backend),
                first_order=first_order,
            )
            for backend in ("plain", "fast")
        )
        torch.testing.assert_close(fast, plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("kind", "rln"), CUTS)
def test_a_learner_learns_what_it_learns_by_autograd(kind: str, rln: int, optimizer: str) -> None:
    """At every cut, also those within a block, from images and from what the frozen part made of them."""
    labels = torch.tensor([3, 3, 7, 0])
    pixels = normal(4, 3, 28, 28) if rln % 2 else images(4)  # in colour and grey
    found: list[Tensor] = []
    for fast, frozen in ((False, True), (True, True), (True, False)):
        net = network(kind, fast)
        trained = trained_parameters(net, rln)
        settings = Settings(0.01, optimizer)
        make = OPTIMIZERS[optimizer]
        own = new_run(net, trained, torch.Generator().manual_seed(1))
        learner = (
            adam_learner(own, trained, settings)
            if fast
            else OnlineLearner(own, trained, lambda params: make(params, 0.01))  # noqa: B023 (called at once)
        )
        assert isinstance(learner, _HandLearner) == fast
        inputs = net.frozen(pixels, trained) if frozen else pixels
        learner.learn(inputs[:1], labels[:1])
        learner.learn(inputs[1:], labels[1:])
        found.append(torch.cat([own.get_parameter(name).detach().flatten() for name in trained]))
    plain, *ours = found
    for one in ours:
        torch.testing.assert_close(one, plain, rtol=1e-7, atol=1e-9)


def test_what_is_not_known_is_left_to_autograd() -> None:
    pixels = images(2)
    net = network("ANML")
    trained = trained_parameters(net, 7)
    assert type(features_of(net, pixels, trained)) is ChainFeatures
    padded = network("ANML")
    conv = padded.get_submodule("pln.block3.conv")
    assert isinstance(conv, nn.Conv2d)
    conv.padding = (1, 1)
    for other in (network("OML"), padded):  # convolutions without blocks, and with a border
        assert type(features_of(other, pixels, trained)) is FeaturesByAutograd
    partway = net.frozen(pixels, trained_parameters(net, 9))
    assert type(features_of(net, partway, trained)) is FeaturesByAutograd  # the meta-gradient goes on below
    with torch.no_grad():
        assert type(features_of(net, partway, trained)) is ChainFeatures
