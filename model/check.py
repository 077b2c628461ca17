"""Checks that a network is what training and meta-test take it for, before hours are spent on it.

Each fault is one line that names the cause. What is tried is a new network of the class.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model import method
from model.method import MetaLoss, Params, call
from model.modelfactory import (
    Network,
    build,
    reset_head,
    restore,
    trained_parameters,
)
from utils.checkpoint import model_content, model_fault, read_saved, write_saved
from utils.errors import UserError

TOLERANCE = 1e-6  # relative, in float64: far above rounding, far below what a wrong gradient is off by
IMAGES = 2
INNER_LR = 0.01
EFFECT_TRIES = 10

Prepare = Callable[[Network], object]


def check_network(
    name: str,
    widths: Mapping[str, Any] | None = None,
    rln: int | None = None,
    *,
    prepare: Prepare = lambda net: None,
    meta_loss: MetaLoss = method.meta_loss,
    every_cut: bool = False,
    channels: int = 1,
) -> None:
    """Say what is wrong with a network.

    It gives finite logits for each image, whatever else is in the batch; it saves and restores to the
    same logits; at every cut the frozen part plus the rest is the whole; two inner steps and the
    meta-gradient are those of plain autograd; the head's rows can be drawn anew; every parameter that
    learns has an effect.

    Args:
        name: its entry in `NETWORKS`; a new one is tried, on the CPU.
        widths: arguments of its class.
        rln: layers that the inner loop leaves alone; None for the network's default.
        prepare: gives a network the layers that it is to be tried with, in place.
        meta_loss: `method.meta_loss`, or what is to give the same numbers.
        every_cut: try all values of `--rln`, not only `rln` and that of meta-test.
        channels: of the images to be, 1 or 3.

    Raises:
        UserError: one line on the first fault.
    """
    try:
        net = build(name, widths or {}, torch.Generator().manual_seed(0))
        prepare(net)
        rln = net.rln_training if rln is None else rln
        trained_parameters(net, rln)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cuts = range(net.num_layers) if every_cut else (rln, net.default_meta_test_rln)
            _check(net, rln, cuts, channels, prepare, meta_loss)
    except _FaultError as fault:
        raise UserError(f"network {name}: {fault}") from None
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"network {name} fails on {IMAGES} images of 28 x 28: {reason}") from error


class _FaultError(Exception):
    """What is wrong, in one line without the network's name."""


def _check(
    net: Network, rln: int, cuts: Iterable[int], channels: int, prepare: Prepare, meta_loss: MetaLoss
) -> None:
    images, labels = _examples(net, channels)
    _check_restored(net, images, prepare)
    # Away from initial values, of which some hide an effect, say a scale of zero.
    precise = _moved(copy.deepcopy(net).double(), 0.05)
    images = images.double()
    evaluated = copy.deepcopy(precise).eval()
    logits = _logits(evaluated, images)
    if logits.shape != (IMAGES, net.num_outputs) or not logits.is_floating_point():
        raise _FaultError(
            f"forward gives {list(logits.shape)} for {IMAGES} images, not "
            f"logits [{IMAGES}, {net.num_outputs}]"
        )
    if not bool(logits.isfinite().all()):
        raise _FaultError("its logits are not finite")
    if not _same(_logits(evaluated, images), logits):
        raise _FaultError(
            "the same images get other logits the second time, in eval mode: it draws or keeps something"
        )
    alone = torch.cat([_logits(evaluated, image[None]) for image in images])
    if not _same(alone, logits):
        raise _FaultError("an image gets other logits alone than in a batch, in eval mode")
    _check_cuts(evaluated, cuts, images, logits)
    _check_head(evaluated)
    _check_functional(evaluated, images)
    _check_gradients(precise, rln, images, labels, meta_loss)
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


def _same(ours: Tensor, theirs: Tensor) -> bool:
    scale = theirs.abs().max().clamp_min(1e-300)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE * scale)


def _check_restored(net: Network, images: Tensor, prepare: Prepare) -> None:
    """Through the bytes of a model file."""
    content = model_content(net.network, net.widths, net.state_dict(), {}, 0)
    fault = model_fault(content)
    if fault is not None:
        raise _FaultError(f"it cannot be saved: {fault}")
    file = io.BytesIO()
    write_saved(content, file)
    saved = read_saved(file.getvalue())
    again = restore(saved["network"], saved["widths"], saved["state_dict"], "its own model file").eval()
    prepare(again)
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


def _check_functional(net: Network, images: Tensor) -> None:
    """Parameters handed in are those that it computes with."""
    moved = _moved(net, 0.01)
    with torch.no_grad():
        handed_in = call(net, dict(moved.named_parameters()), images)
    if not _same(handed_in, _logits(moved, images)):
        raise _FaultError(
            "it does not compute with the parameters that it is handed: one is referred to from outside of "
            "its module, or through .data"
        )


def _check_gradients(net: Network, rln: int, images: Tensor, labels: Tensor, meta_loss: MetaLoss) -> None:
    """Two inner steps and the meta-gradient, by the loop in use and by one that knows nothing of it."""
    plain, ours = copy.deepcopy(net), copy.deepcopy(net)
    names = trained_parameters(net, rln)
    params: Params = {name: ours.get_parameter(name) for name in names}
    learned = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]):  # both draw the same, say for dropout
        inputs = ours.frozen(images, params)
        support, query = (inputs[:2], labels[:2]), (inputs, labels)
        loss, _, _ = meta_loss(ours, params, support, query, inner_lr=INNER_LR)
        grads = _grads(loss, list(learned.values()))
    expected_loss, expected = _unrolled(plain, names, images, labels)
    if not _same(loss.detach(), expected_loss):
        raise _FaultError("two inner steps give another loss than plain autograd")
    scale = max(float(grad.detach().abs().max()) for grad in expected)
    for name, grad, other in zip(learned, grads, expected, strict=True):
        if (grad - other).abs().max() > TOLERANCE * scale:
            raise _FaultError(f"the meta-gradient of {name} is not that of plain autograd")


def _grads(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        loss, params, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _unrolled(
    net: Network, names: Sequence[str], images: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Loss after two SGD steps and its gradient, by putting the stepped parameters into their modules.

    The network is called as it is, whole, image by image and without `functional_call`.
    """
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    current: dict[str, Tensor] = {name: learned[name] for name in names}
    names_by_id = {id(p): name for name, p in current.items()}
    places = [
        (module, key, names_by_id[id(p)])
        for module in net.modules()
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in names_by_id
    ]
    for step in range(2):
        loss = F.cross_entropy(net(images[step : step + 1]), labels[step : step + 1])
        grads = _grads(loss, list(current.values()), create_graph=True)
        current = {name: p - INNER_LR * g for (name, p), g in zip(current.items(), grads, strict=True)}
        for module, key, name in places:
            module._parameters.pop(key, None)
            object.__setattr__(module, key, current[name])
    loss = F.cross_entropy(net(images), labels)
    return loss.detach(), list(_grads(loss, list(learned.values())))


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
