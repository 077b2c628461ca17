"""Compares a backend with plain at the start of a run; a run uses a backend only where the two agree.

Plain is the definition: an unprepared network, `model.method` and `model.learner` as they stand in the
working copy, edited or not. Both compute in float64: the logits and their gradient, the meta-loss, the
meta-gradient of every parameter and updates of the online learner. They are compared on two networks: the
run's network with a few inner steps, and a narrow network of its class with all inner steps of the run.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import check, method
from model.check import Use
from model.learner import LEARNERS, Given, LearnerKind, MakeLearner, adam_learner
from model.method import MetaLoss, Params
from model.modelfactory import FAILURES, Network, build, trained_parameters
from utils.errors import UserError, reason

same = partial(check.same, tolerance=1e-8)  # far above rounding in float64, far below the effect of an edit
EXPLODED = 300  # a loss or gradient of this size means that the trajectory diverges
SMALLEST_LR = 1e-4  # of the inner loop; at smaller steps an explosion is the network's own
NARROW = {"nm_channels": 6, "pln_channels": 8, "hidden": 12, "num_classes": 8}
FEW_STEPS = 2  # inner steps of the run's network, whose full trajectory would take too long
OTHERS = 1  # query images beside those of the trajectory


class Backend(NamedTuple):
    """An implementation of `model.method`.

    Attributes:
        name: `plain` or `fast`.
        prepare: gives a network the backend's layers, in place. Raises NotImplementedError where the backend
            does not support the network.
        meta_loss: used in place of `model.method.meta_loss`.
        capture: turns the meta-gradient, a function of tensors that computes with a network, into one that
            may be faster, and whose results the next call may overwrite.
        adam_learner: used in place of `model.learner.adam_learner`.
        why: the reason for the choice of the backend.
    """

    name: str
    prepare: Callable[[Network], None]
    meta_loss: MetaLoss
    capture: Callable[[Callable[..., Any], Network], Callable[..., Any]] | None
    adam_learner: MakeLearner
    why: str = "as asked for"

    def learner(self, name: str) -> LearnerKind:
        """The entry `name` of `LEARNERS`, with the backend's own constructor for `adam`."""
        kind = LEARNERS[name]
        return replace(kind, make=self.adam_learner) if kind.make is adam_learner else kind


PLAIN = Backend("plain", lambda net: None, method.meta_loss, None, adam_learner)


def difference(net: Network, device: torch.device, use: Use, candidate: Backend) -> str | None:
    """The first difference between a backend and plain, or why the backend fails; None if both agree."""
    if use.inner.rule is not None:
        return "the fast backend knows SGD as inner rule alone"
    try:
        candidate.prepare(copy.deepcopy(net))
        widths = {name: min(value, NARROW.get(name, value)) for name, value in net.widths.items()}
        narrow = build(net.network, widths, torch.Generator().manual_seed(0), net.image_size)
        narrow.train(net.training)
        for tried, steps in ((narrow, use.update_step), (net, min(use.update_step, FEW_STEPS))):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                found = _difference(tried, device, use, steps, candidate)
            if found is not None:
                return f"fast gives other numbers than what is written: {found}"
    except NotImplementedError as error:
        return str(error)
    except (*FAILURES, UserError) as error:
        return f"fast fails: {reason(error)}"
    return None


def _difference(net: Network, device: torch.device, use: Use, steps: int, candidate: Backend) -> str | None:
    plain = _moved(copy.deepcopy(net).to(device).double())
    fast = copy.deepcopy(plain)
    candidate.prepare(fast)
    images, labels = _examples(net, steps + OTHERS, use.channels, device)
    both = (plain, PLAIN), (fast, candidate)

    if not all(map(same, *_of_both(lambda net, _: _logits(net, images), both))):
        return "the logits or their gradient"
    (values, grads), (fast_values, fast_grads) = _of_both(
        lambda net, backend: _meta_gradient(net, backend, images, labels, steps, use), both
    )
    scale = max(float(x.detach().abs().max()) for x in (values, *grads.values()))
    # An exploding trajectory amplifies rounding errors as well: smaller steps separate them from edits.
    if not scale < EXPLODED and use.inner.lr > SMALLEST_LR:
        smaller = replace(use, inner=replace(use.inner, lr=use.inner.lr / 10))
        return _difference(net, device, smaller, steps, candidate)
    if not same(values[:steps], fast_values[:steps]):
        return "the inner step"
    if not same(values, fast_values):
        return "the meta-loss"
    for name, grad in grads.items():
        if not same(grad, fast_grads[name], scale):
            return f"the gradient of {name}"

    (params, answers), (fast_params, fast_answers) = _of_both(
        lambda net, backend: _online(net, backend, images[-steps:], labels[-steps:], use), both
    )
    if not all(map(same, params, fast_params)):
        return "the online update"
    return None if torch.equal(answers, fast_answers) else "the online learner's answers"


def _of_both(
    compute: Callable[[Network, Backend], Any], both: Sequence[tuple[Network, Backend]]
) -> list[Any]:
    """The results of `compute` for both backends, with the same random numbers (say for dropout)."""
    found = []
    for net, backend in both:
        torch.manual_seed(1)
        found.append(compute(net, backend))
    return found


def _logits(net: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a function of these by all parameters that learn, in one vector."""
    logits, learned = net(images), [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits.sin().sum(), learned, allow_unused=True, materialize_grads=True)
    return logits, torch.cat([grad.flatten() for grad in grads])


def _meta_gradient(
    net: Network, backend: Backend, images: Tensor, labels: Tensor, steps: int, use: Use
) -> tuple[Tensor, dict[str, Tensor]]:
    """Inner losses, logits and loss in one vector, and the meta-gradient of each parameter by name."""
    names = trained_parameters(net, net.rln_training if use.rln is None else use.rln)
    params: Params = {name: net.get_parameter(name) for name in names}
    # Plain gets whole images, since frozen outputs are a shortcut that is compared as well.
    inputs = images if backend is PLAIN else net.frozen(images, params)
    support, query = (inputs[-steps:], labels[-steps:]), (inputs, labels)
    loss, logits, inner_losses = backend.meta_loss(net, params, support, query, use.inner)
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(learned.values()), allow_unused=True, materialize_grads=True)
    values = torch.cat([inner_losses, logits.flatten(), loss[None]])
    return values, dict(zip(learned, grads, strict=True))


def _online(
    net: Network, backend: Backend, images: Tensor, labels: Tensor, use: Use
) -> tuple[list[Tensor], Tensor]:
    """The parameters after some updates of the online learner, and its answers after them."""
    net = copy.deepcopy(net).eval()
    rln = net.default_meta_test_rln if use.meta_test_rln is None else use.meta_test_rln
    trained = trained_parameters(net, rln)
    learner = backend.adam_learner(net, trained, Given(lr=0.01), **use.options)
    with torch.no_grad():
        inputs = images if backend is PLAIN else net.frozen(images, trained)
    learner.learn(inputs, labels)
    return [p.detach() for p in net.parameters()], learner.predict(inputs)


@torch.no_grad()
def _moved(net: Network) -> Network:
    """Add noise to all parameters, in place: initial scales of 1 and biases of 0 would hide edits."""
    for parameter in net.parameters():
        size = 1.0 if parameter.ndim < 2 else 0.1 * float(parameter.std(correction=0))
        parameter.add_(torch.randn_like(parameter), alpha=size)
    return net


def _examples(net: Network, count: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels; every other image has few bright pixels, which make activations large."""
    shape = count, channels, net.image_size, net.image_size
    images = torch.randn(shape, device=device, dtype=torch.float64)
    images[::2] = (torch.rand_like(images[::2]) > 0.98) * 5 + 0.1 * images[::2]
    return images, torch.arange(count, device=device) % net.num_outputs
