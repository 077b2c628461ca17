"""Checks that a network is what training and meta-test take it for, before hours are spent on it.

Each fault is one line that names the cause. What is tried is a new network of the class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.modelfactory import (
    Network,
    build,
    layer_parameters,
    reset_head,
    restore,
    trained_parameters,
)
from utils.errors import UserError
from utils.files import Checkpoint

TOLERANCE = 1e-6  # relative, in float64: far above rounding, far below what a wrong gradient is off by
IMAGES = 2
EFFECT_TRIES = 10


def check_network(
    name: str,
    widths: Mapping[str, Any] | None = None,
    rln: int | None = None,
    *,
    second_order: bool = True,
    every_cut: bool = False,
    channels: int = 1,
) -> None:
    """Say what is wrong with a network. Nothing here asks what the method does with it.

    It gives finite logits for each image, whatever else is in the batch; it saves and restores to the
    same logits; at every cut the frozen part plus the rest is the whole; it computes with the parameters that
    it is handed, and its derivatives are theirs; the head's rows can be drawn anew; every parameter that
    learns has an effect.

    Args:
        name: its entry in `NETWORKS`; a new one is tried, on the CPU.
        widths: arguments of its class.
        rln: layers that the inner loop leaves alone; None for the network's default.
        second_order: whether training takes second derivatives.
        every_cut: try all values of `--rln`, not only `rln` and that of meta-test.
        channels: of the images to be, 1 or 3.

    Raises:
        UserError: one line on the first fault.
    """
    try:
        net = build(name, widths or {}, torch.Generator().manual_seed(0))
        rln = net.rln_training if rln is None else rln
        trained_parameters(net, rln)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cuts = range(len(layer_parameters(net))) if every_cut else (rln, net.default_meta_test_rln)
            _check(net, cuts, channels, second_order)
    except _FaultError as fault:
        raise UserError(f"network {name}: {fault}") from None
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"network {name} fails on {IMAGES} images of 28 x 28: {reason}") from error


class _FaultError(Exception):
    """What is wrong, in one line without the network's name."""


def _check(net: Network, cuts: Iterable[int], channels: int, second_order: bool) -> None:
    images, labels = _examples(net, channels)
    # Away from initial values, of which some hide an effect, say a scale of zero.
    precise = _moved(copy.deepcopy(net).double(), 0.05)
    single, images = images, images.double()
    evaluated = copy.deepcopy(precise).eval()
    logits = _logits(evaluated, images)
    if logits.shape != (IMAGES, net.num_outputs) or not logits.is_floating_point():
        raise _FaultError(
            f"forward gives {list(logits.shape)} for {IMAGES} images, not "
            f"logits [{IMAGES}, {net.num_outputs}]"
        )
    if not bool(logits.isfinite().all()):
        raise _FaultError("its logits are not finite")
    _check_restored(net, single)
    if not _same(_logits(evaluated, images), logits):
        raise _FaultError(
            "the same images get other logits the second time, in eval mode: it draws or keeps something"
        )
    alone = torch.cat([_logits(evaluated, image[None]) for image in images])
    if not _same(alone, logits):
        raise _FaultError("an image gets other logits alone than in a batch, in eval mode")
    _check_cuts(evaluated, cuts, images, logits)
    _check_head(evaluated)
    _check_features(evaluated, images)
    _check_derivatives(precise, images, labels, second_order)
    _check_effects(evaluated, channels)


def _examples(net: Network, channels: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    return torch.randn(IMAGES, channels, 28, 28), torch.arange(IMAGES) % net.num_outputs


@torch.no_grad()
def _moved(net: Network, size: float) -> Network:
    """A copy with something random added to all parameters."""
    moved = copy.deepcopy(net)
    for parameter in moved.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=size)
    return moved


@torch.no_grad()
def _logits(net: Network, images: Any) -> Tensor:
    logits: Tensor = net(images)
    return logits


def _same(ours: Tensor, theirs: Tensor, scale: float = 1e-300) -> bool:
    scale = max(scale, float(theirs.abs().max()))
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE * scale)


def _check_restored(net: Network, images: Tensor) -> None:
    """Through the bytes of a model file."""
    try:
        data = Checkpoint(net.network, net.widths, dict(net.state_dict()), {}, 0).to_bytes()
    except ValueError as error:
        raise _FaultError(f"it cannot be saved: {error}") from None
    saved = Checkpoint.of_bytes(data)
    again = restore(saved.network, saved.widths, saved.state_dict, "its own model file").eval()
    if not torch.equal(_logits(again, images), _logits(copy.deepcopy(net).eval(), images)):
        raise _FaultError(
            "saved and restored, it gives other logits: something that it computes with is neither a "
            "parameter nor a buffer, nor follows from the constructor's arguments"
        )


def _check_cuts(net: Network, cuts: Iterable[int], images: Tensor, logits: Tensor) -> None:
    for rln in cuts:
        trained = trained_parameters(net, rln)
        with torch.no_grad():
            inputs = net.frozen(images, trained)
            rest = net(inputs)
            row = net(inputs[:1])
        if not _same(rest, logits) or not _same(row, logits[:1]):
            raise _FaultError(
                f"at --rln {rln} the frozen part plus the rest gives other logits than the whole"
            )


def _check_head(net: Network) -> None:
    reset = copy.deepcopy(net)
    before = {name: value.clone() for name, value in reset.state_dict().items()}
    reset_head(reset, torch.Generator().manual_seed(0), [0])
    head_names = {name for name, _ in reset.named_parameters() if name.startswith("head.")}
    changed = [name for name, value in reset.state_dict().items() if not torch.equal(value, before[name])]
    if not changed:
        raise _FaultError(
            "the head has no weight with a row for each class, so none can be drawn anew before a trajectory"
        )
    if head_names and not head_names.intersection(changed):
        raise _FaultError(f"drawing the head anew changes {changed[0]}, which is not the head's")


def _check_features(net: Network, images: Tensor) -> None:
    """Statistics and heads without gradients ask for what enters the head."""
    try:
        with torch.no_grad():
            features = net.features(images)
    except IndexError:
        raise _FaultError(
            "what enters its head is unknown, since `self.head` is not called: call it, or define `features`"
        ) from None
    if features.ndim != 2 or len(features) != IMAGES:
        raise _FaultError(f"features gives {list(features.shape)} for {IMAGES} images, not [{IMAGES}, F]")


def _check_derivatives(net: Network, images: Tensor, labels: Tensor, second_order: bool) -> None:
    """Parameters handed in are those that it computes with: logits and derivatives are those of a network
    whose own parameters they are."""
    moved = _moved(net, 0.01)
    steps = {name: (p - net.get_parameter(name)).detach() for name, p in moved.named_parameters()}
    own = {name: p for name, p in moved.named_parameters() if p.requires_grad}
    # Not leaves, as fast weights are not.
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    with _handed_in(net, {name: leaf + steps[name] for name, leaf in leaves.items()}):
        ours = _derivatives(net, [leaves[name] for name in own], images, labels, second_order)
    expected = _derivatives(moved, list(own.values()), images, labels, second_order)
    names = ["", *own, *own]
    for name, found, right in zip(names, ours, expected, strict=False):
        if not _same(found, right, float(max(x.abs().max() for x in expected[1:])) if name else 0.0):
            what = f"the gradient of {name}" if name else "its loss"
            raise _FaultError(
                f"it does not compute with the parameters that it is handed ({what} is another): one is "
                "referred to from outside of its module, or through .data"
            )


def _derivatives(
    net: Network, params: Sequence[Tensor], images: Tensor, labels: Tensor, second_order: bool
) -> list[Tensor]:
    """Loss, gradients and, where asked for, gradients of a function of these."""
    with torch.random.fork_rng(devices=[]):  # each call draws the same, say for dropout
        loss = F.cross_entropy(net(images), labels)
    grads = _grads(loss, params, create_graph=second_order)
    found = [loss.detach(), *(grad.detach() for grad in grads)]
    if second_order:
        try:
            # Through the whole graph: `once_differentiable` lets pass what asks for the gradients of tensors.
            torch.autograd.backward(sum((grad.sin().sum() for grad in grads), start=loss * 0))
        except RuntimeError as error:
            raise _FaultError(f"it has no second derivative: train with --first_order ({error})") from error
        found += [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    return found


@contextmanager
def _handed_in(net: Network, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Other parameters in place of the network's own, in each module that has them."""
    names = {id(p): name for name, p in net.named_parameters()}
    places = [
        (module._parameters, key, p)
        for module in net.modules()
        for key, p in module._parameters.items()
        if p is not None
    ]
    try:
        for table, key, p in places:
            table[key] = params[names[id(p)]]  # type: ignore[assignment]
        yield
    finally:
        for table, key, p in places:
            table[key] = p


def _grads(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        loss, params, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _check_effects(net: Network, channels: int) -> None:
    """Several times, since a small network may be dead for the images and parameters of one."""
    missing = {name for name, p in net.named_parameters() if p.requires_grad} - set(net.no_effect)
    for _ in range(EFFECT_TRIES):
        moved = _moved(net, 0.05)
        images, labels = _examples(net, channels)
        loss = F.cross_entropy(moved(images.double()), labels)
        params = [moved.get_parameter(name) for name in sorted(missing)]
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        missing -= {
            name for name, g in zip(sorted(missing), grads, strict=True) if g is not None and bool(g.any())
        }
        if not missing:
            return
    raise _FaultError(
        f"{min(missing)} has no effect on the logits: leave it out, or name it in `no_effect` of the class"
    )
