"""Checks that a network is what training and meta-test take it for, before hours are spent on it.

Each fault is one line that names the cause. What is tried is a new network of the class.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.func import functional_call

from datasets.images import SIZE
from model.method import InnerLoop, Params, kept_rule, meta_loss
from model.modelfactory import (
    FAILURES,
    Network,
    build,
    head_rows,
    image_arguments,
    layer_parameters,
    restore,
    trained_parameters,
)
from utils.errors import UserError, reason
from utils.files import Checkpoint

TOLERANCE = 1e-6  # far above rounding in float64, far below what a wrong gradient is off by
IMAGES = 2
SMALL_LR = 1e-3  # of inner steps at random weights, which larger ones may make explode
OTHER_LOGITS = "the frozen part plus the rest gives other logits than the whole"
DEFAULT, UPDATE_STEP = InnerLoop(0.1), 20
EFFECT_TRIES = 10  # a small network may be dead for the images and parameters of one try


@dataclass(frozen=True)
class Use:
    """The use of a network in a run.

    Attributes:
        rln: layers frozen in the inner loop; None for the network's default.
        inner: settings of the inner loop.
        update_step: inner steps.
        meta_test_rln: layers frozen in the online learner; None for the network's default.
        options: keyword arguments of the online learner.
        channels: of the images, 1 or 3.
    """

    rln: int | None = None
    inner: InnerLoop = DEFAULT
    update_step: int = UPDATE_STEP
    meta_test_rln: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 1


def check_network(
    name: str,
    widths: Mapping[str, Any] | None = None,
    use: Use = Use(),
    *,
    second_order: bool = True,
    every_cut: bool = False,
    size: int = SIZE,
) -> None:
    """Say what is wrong with a network. Nothing here asks what the method does with it.

    It gives finite logits for each image, whatever else is in the batch; it saves and restores to the
    same logits; at every cut the frozen part plus the rest is the whole; it computes with the parameters that
    it is handed, and its derivatives are theirs; the head's rows can be drawn anew; every parameter that
    learns has an effect. Nothing passes from one inner loop to the next, and the rule has the derivatives
    that the run takes.

    Args:
        name: its entry in `NETWORKS`; a new one is tried, on the CPU.
        widths: arguments of its class.
        use: its `rln`, `channels` and inner rule count; the rule is tried where it is not the paper's.
        second_order: whether training takes second derivatives.
        every_cut: try all values of `--rln`, not only that of `use` and that of meta-test.
        size: side of the images to be, in pixels.

    Raises:
        UserError: one line on the first fault.
    """
    try:
        net = build(name, widths or {}, torch.Generator().manual_seed(0), size)
        rln = net.rln_training if use.rln is None else use.rln
        trained_parameters(net, rln)
        cuts = range(len(layer_parameters(net))) if every_cut else (rln, net.default_meta_test_rln)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fault = next(_faults(net, cuts, use.channels, second_order), None)
            if fault is None and use.inner.rule is not None:
                fault = _fault_of_rule(net.double(), trained_parameters(net, rln), use.channels, use.inner)
    except FAILURES as error:
        what = f"network {name} fails on {IMAGES} images of {size} x {size}"
        raise UserError(f"{what}: {reason(error)}") from error
    if fault is not None:
        raise UserError(f"network {name}: {fault}")


def _faults(net: Network, cuts: Iterable[int], channels: int, second_order: bool) -> Iterator[str]:
    """What is wrong, each fault in one line without the network's name."""
    images, labels = _examples(net, channels)
    # Away from initial values, of which some hide an effect, say a scale of zero.
    precise = _moved(copy.deepcopy(net).double(), 0.05)
    evaluated = copy.deepcopy(precise).eval()
    yield from _faults_of_logits(evaluated, images.double())
    yield from _faults_of_restored(net, images)
    yield from _faults_of_parts(evaluated, cuts, images.double())
    penalty = precise.penalty()
    if penalty is not None and (penalty.ndim or not (penalty.requires_grad and penalty.isfinite())):
        yield f"penalty gives {penalty}, not one finite number that follows from its parameters"
    yield from _faults_of_derivatives(precise, images.double(), labels, second_order)
    without = _without_effect(evaluated, channels)
    if without:
        remedy = "leave it out, or name it in `no_effect` of the class"
        yield f"{min(without)} has no effect on the logits: {remedy}"


def _examples(net: Network, channels: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    shape = IMAGES, channels, net.image_size, net.image_size
    return torch.randn(shape), torch.arange(IMAGES) % net.num_outputs


@torch.no_grad()
def _moved(net: Network, size: float) -> Network:
    """A copy with something random added to all parameters."""
    moved = copy.deepcopy(net)
    for parameter in moved.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=size)
    return moved


def same(ours: Tensor, theirs: Tensor, scale: float = 0.0, tolerance: float = TOLERANCE) -> bool:
    """Whether two results agree up to rounding, relative to the larger of their size and `scale`."""
    ours, theirs = ours.detach(), theirs.detach()
    size = max(scale, float(theirs.abs().max()), 1e-300)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * size)


@torch.no_grad()
def _faults_of_logits(net: Network, images: Tensor) -> Iterator[str]:
    logits: Tensor = net(images)
    expected = [IMAGES, net.num_outputs]
    if list(logits.shape) != expected or not logits.is_floating_point():
        yield f"forward gives {list(logits.shape)} for {IMAGES} images, not logits {expected}"
    if not bool(logits.isfinite().all()):
        yield "its logits are not finite"
    if not same(net(images), logits):
        yield "the same images get other logits the second time, in eval mode: it draws or keeps something"
    if not same(torch.cat([net(image[None]) for image in images]), logits):
        yield "an image gets other logits alone than in a batch, in eval mode"


@torch.no_grad()
def _faults_of_restored(net: Network, images: Tensor) -> Iterator[str]:
    """Through the bytes of a model file."""
    try:
        data = Checkpoint(net.network, net.widths, dict(net.state_dict()), image_arguments(net), 0).to_bytes()
    except ValueError as error:
        yield f"it cannot be saved: {error}"
        return
    again = restore(Checkpoint.of_bytes(data), "its own model file").eval()
    if not torch.equal(again(images), copy.deepcopy(net).eval()(images)):
        yield (
            "saved and restored, it gives other logits: something that it computes with is neither a "
            "parameter nor a buffer, nor follows from the constructor's arguments"
        )


@torch.no_grad()
def _faults_of_parts(net: Network, cuts: Iterable[int], images: Tensor) -> Iterator[str]:
    """Of the frozen part, of the head and of what enters the head."""
    logits: Tensor = net(images)
    for rln in cuts:
        inputs = net.frozen(images, trained_parameters(net, rln))
        if not same(net(inputs), logits) or not same(net(inputs[:1]), logits[:1]):
            yield f"at --rln {rln} {OTHER_LOGITS}"
    if not head_rows(net):
        yield "the head has no weight with a row for each class, to be drawn anew before a trajectory"
    try:
        features = net.features(images)
    except IndexError:
        yield "what enters the head is unknown: call `self.head`, or define `features`"
        return
    if features.ndim != 2 or len(features) != IMAGES:
        yield f"features gives {list(features.shape)} for {IMAGES} images, not [{IMAGES}, F]"


def _faults_of_derivatives(net: Network, images: Tensor, labels: Tensor, second_order: bool) -> Iterator[str]:
    """Of loss and gradients at parameters that are handed in, against a network with these parameters."""
    moved = _moved(net, 0.01)
    own = {name: p for name, p in moved.named_parameters() if p.requires_grad}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    # Fast weights are not leaves of the graph either.
    handed = {name: leaf + (moved.get_parameter(name) - leaf).detach() for name, leaf in leaves.items()}

    def derivatives(forward: Callable[[], Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss, gradients and, where asked for, gradients of a function of these, by name."""
        torch.manual_seed(1)  # each call draws the same, say for dropout
        loss = F.cross_entropy(forward(), labels)
        learned = [params[name] for name in own]
        grads = torch.autograd.grad(
            loss, learned, create_graph=second_order, allow_unused=True, materialize_grads=True
        )
        found = {"its loss": loss}
        found |= {f"the gradient of {name}": grad for name, grad in zip(own, grads, strict=True)}
        if second_order:
            try:
                # Through the whole graph: `once_differentiable` lets pass what asks for gradients of tensors.
                torch.autograd.backward(sum((grad.sin().sum() for grad in grads), start=loss * 0))
            except RuntimeError as error:
                cause = f"it has no second derivative: train with --first_order ({error})"
                raise UserError(f"network {net.network}: {cause}") from error
            found |= {
                f"the second derivative by {name}": torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in zip(own, learned, strict=True)
            }
        return {what: value.detach() for what, value in found.items()}

    ours = derivatives(lambda: functional_call(net, handed, images), leaves)
    expected = derivatives(lambda: moved(images), own)
    largest = max(float(value.abs().max()) for what, value in expected.items() if what != "its loss")
    for what, right in expected.items():
        if not same(ours[what], right, 0.0 if what == "its loss" else largest):
            yield (
                f"it does not compute with the parameters that it is handed ({what} is another): one is "
                "referred to from outside of its module, or through .data"
            )


def _fault_of_rule(net: Network, names: Iterable[str], channels: int, inner: InnerLoop) -> str | None:
    """Of the inner rule: loss and meta-gradient of the same inner loop, twice in a row."""
    params: Params = {name: net.get_parameter(name) for name in names}
    images, labels = _examples(net, channels)
    examples, found = (images.double(), labels), list[Tensor]()
    inner, _ = kept_rule(replace(inner, lr=min(inner.lr, SMALL_LR)), params)
    try:
        for _ in range(2):
            torch.manual_seed(1)
            loss = meta_loss(net, params, examples, examples, inner)[0]
            grads = torch.autograd.grad(loss, [*params.values()], allow_unused=True, materialize_grads=True)
            found.append(torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)]))
    except RuntimeError as error:
        return f"the inner rule has no such meta-gradient, or keeps state between inner loops: {error}"
    if same(found[0], found[1]) or not bool(torch.cat(found).isfinite().all()):
        return None
    return (
        "the inner rule gives other numbers in the second inner loop than in the first: state belongs into "
        "the function that is called before each inner loop"
    )


def _without_effect(net: Network, channels: int) -> set[str]:
    """Names of the parameters of which the logits are independent in all tries."""
    missing = {name for name, p in net.named_parameters() if p.requires_grad} - set(net.no_effect)
    for _ in range(EFFECT_TRIES):
        moved, (images, labels) = _moved(net, 0.05), _examples(net, channels)
        loss = F.cross_entropy(moved(images.double()), labels)
        names = sorted(missing)
        grads = torch.autograd.grad(loss, [moved.get_parameter(name) for name in names], allow_unused=True)
        missing -= {name for name, g in zip(names, grads, strict=True) if g is not None and bool(g.any())}
        if not missing:
            break
    return missing
