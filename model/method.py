"""The method: learn a trajectory image by image, and how well the initial weights let that be done.

Plain PyTorch, for every network: `net(images)` gives logits, `params` holds those of its parameters that
learn, by name. Paper, algorithm 1 and section 3; what is faster stands in `model/fast`, with the same
numbers.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.func import grad_and_value

from model.layers import Inputs
from utils.flag import Range

Params = dict[str, Tensor]
"""Parameters that learn, or fast weights or gradients in their place, by name."""

InnerRule = Callable[[Params, Params], Params]
"""From params and their gradients to the params after an inner step."""

MakeRule = Callable[[Params, float], InnerRule]
"""From initial params and a step size to the rule of one inner loop, whose state begins anew. A rule that is
an `nn.Module` holds what it learns: the outer loop makes one, for all inner loops."""

Forward = Callable[[Params, Inputs], Tensor]
"""From params and images to logits [B, classes]."""

Examples = tuple[Inputs, Tensor]
"""Images [B, C, S, S] or a network's frozen output of them, and class ids [B]."""


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the inner loop.

    Attributes:
        lr: step size.
        second_order_steps: the last steps that are differentiated through; the gradients of the steps before
            are constants. None: all steps (paper). 0: first order (released code).
        rule: takes the place of `sgd`.
    """

    lr: float
    second_order_steps: int | None = None
    rule: MakeRule | None = None

    def constant(self, steps: int) -> int:
        """How many of `steps` steps, the first ones, have constants for gradients."""
        return 0 if self.second_order_steps is None else max(0, steps - self.second_order_steps)


class Optimizer(Protocol):
    """What an online learner steps with; holds the parameters."""

    def step(self, gradients: Sequence[Tensor]) -> None: ...

    def state_dict(self) -> Mapping[str, Sequence[Tensor]]:
        """What a step changes beside the parameters; the tensors themselves, not copies."""


def sgd(_: Params, inner_lr: float) -> InnerRule:
    """The paper's rule, p - update_lr * g."""
    return lambda params, grads: {name: p.add(grads[name], alpha=-inner_lr) for name, p in params.items()}


def momentum(
    initial: Params,
    inner_lr: float,
    *,
    momentum: Annotated[float, "part of the velocity that each inner step keeps", Range(0, 1)] = 0.9,
) -> InnerRule:
    """SGD with momentum, as `torch.optim.SGD`; the velocity is 0 at the start of each inner loop."""
    velocity = {name: torch.zeros_like(p) for name, p in initial.items()}

    def rule(params: Params, grads: Params) -> Params:
        for name, grad in grads.items():
            velocity[name] = momentum * velocity[name] + grad
        return {name: p.add(velocity[name], alpha=-inner_lr) for name, p in params.items()}

    return rule


class MetaSGD(nn.Module):
    """Meta-SGD: a learned step size for every number of every parameter, which begins at --update_lr.

    Li et al., *Meta-SGD: learning to learn quickly for few-shot learning* (2017). The outer Adam learns the
    step sizes; training states and model files keep them.

    Args:
        params: those that the inner loop changes.
        inner_lr: the step size that all begin with.
    """

    def __init__(self, params: Params, inner_lr: float) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "/") for name in params}  # a module's own names have no dots
        for name, p in params.items():
            self.register_parameter(self.names[name], nn.Parameter(torch.full_like(p, inner_lr)))

    def forward(self, params: Params, grads: Params) -> Params:
        """p - inner_lr * g, number by number."""
        return {name: p - self.inner_lr(name) * grads[name] for name, p in params.items()}

    def inner_lr(self, name: str) -> Tensor:
        """The step sizes of one parameter, in its shape."""
        return self.get_parameter(self.names[name])


INNER_RULES: dict[str, Callable[..., InnerRule]] = {"sgd": sgd, "momentum": momentum, "meta_sgd": MetaSGD}
"""What `--inner_rule` may name. An entry is a `MakeRule` whose keyword arguments are flags."""


def kept_rule(inner: InnerLoop, params: Params) -> tuple[InnerLoop, nn.Module | None]:
    """Settings with which all inner loops share a rule that is a module, and the module, if there is one."""
    made = inner.rule and inner.rule(params, inner.lr)
    if not isinstance(made, nn.Module):
        return inner, None
    return replace(inner, rule=lambda *_: made), made


def functional(net: nn.Module, names: Collection[str]) -> Forward:
    """A function of params and images that gives logits [B, classes]: `net` with params of these names in
    place of its own, wherever it uses them.

    The places are looked up once. A module that is registered twice is one place, and a parameter of two
    modules has two. (`torch.func.functional_call` looks them up at every call.)
    """
    name_of = {id(p): name for name, p in net.named_parameters() if name in names}
    places = [
        (module._parameters, key, name_of[id(p)], p)
        for module in net.modules()
        for key, p in module._parameters.items()
        if id(p) in name_of
    ]

    def logits(params: Params, images: Inputs) -> Tensor:
        try:
            for table, key, name, _ in places:
                table[key] = params[name]  # type: ignore[assignment]
            found: Tensor = net(images)
        finally:
            for table, key, _, own in places:
                table[key] = own
        return found

    return logits


def loss_and_grads(
    forward: Forward, params: Params, images: Inputs, labels: Tensor, create_graph: bool
) -> tuple[Tensor, Params]:
    """Mean cross-entropy at `params` and its gradient; zero for a parameter without effect."""

    def loss_at(params: Params) -> Tensor:
        return F.cross_entropy(forward(params, images), labels)

    loss = loss_at(params)
    if loss.requires_grad and all(p.requires_grad for p in params.values()):
        grads = torch.autograd.grad(
            loss, list(params.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return loss, dict(zip(params, grads, strict=True))
    # Under vmap tensors do not show that they require grad; torch.func's own gradient needs no sign of it.
    found, loss = grad_and_value(loss_at)(params)
    return loss, {name: g if create_graph else g.detach() for name, g in found.items()}


def inner_loop(
    net: nn.Module, params: Params, images: Inputs, labels: Tensor, inner: InnerLoop
) -> tuple[Params, Tensor]:
    """One SGD step on each image in turn (paper, algorithm 1).

    Fast weights are the initial ones minus the steps, and differentiable with respect to them. Where a
    step's gradient is taken without a graph it counts as a constant: first order, as the released code.

    Args:
        images, labels: the trajectory, T images in order.

    Returns:
        the fast weights, and [T] the loss before each step.
    """
    rule = (inner.rule or sgd)(params, inner.lr)
    forward = functional(net, params)
    losses = []
    for t in range(len(labels)):
        create_graph = t >= inner.constant(len(labels))
        loss, grads = loss_and_grads(forward, params, images[t : t + 1], labels[t : t + 1], create_graph)
        params = rule(params, grads)
        losses.append(loss.detach())
    return params, torch.stack(losses)


def meta_loss(
    net: nn.Module, params: Params, support: Examples, query: Examples, inner: InnerLoop
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss that meta-training minimises; its `.backward()` gives the meta-gradient.

    Args:
        params: initial values of the parameters that the inner loop changes.
        support: the trajectory.
        query: what is tested at the fast weights: remember set and trajectory.

    Returns:
        mean cross-entropy of the query, its logits [B, classes], and [T] the inner losses.
    """
    fast_params, inner_losses = inner_loop(net, params, *support, inner)
    logits = functional(net, params)(fast_params, query[0])
    return F.cross_entropy(logits, query[1]), logits, inner_losses


MetaLoss = Callable[[nn.Module, Params, Examples, Examples, InnerLoop], tuple[Tensor, Tensor, Tensor]]
""":func:`meta_loss`, or what gives the same numbers."""


def classify(logits: Tensor) -> Tensor:
    """The class of the largest of `logits` [B, K]: [B]; -1 where the logits are not all finite.

    Argmax takes NaN for the largest: with weights of NaN every image would be of class 0.
    """
    return logits.argmax(1).where(logits.isfinite().all(1), -1)


class OnlineLearner:
    """Learns a stream at meta-test: one optimizer step on each image in turn (paper, section 3).

    Args:
        net: changed in place.
        trained: names of the parameters that learn.
        optimizer: makes an optimizer of these parameters.
    """

    def __init__(
        self, net: nn.Module, trained: Collection[str], optimizer: Callable[[list[Tensor]], Optimizer]
    ) -> None:
        self.net = net
        self.params: list[Tensor] = [net.get_parameter(name) for name in trained]
        self.optimizer = optimizer(self.params)

    def learn(self, images: Inputs, labels: Tensor) -> None:
        """Learn images in order, one after the other."""
        for t in range(len(labels)):
            self.step(images[t : t + 1], labels[t : t + 1])

    def step(self, image: Inputs, label: Tensor) -> None:
        """One optimizer step on one image."""
        loss = F.cross_entropy(self.net(image), label)
        grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        self.optimizer.step(grads)

    @torch.no_grad()
    def predict(self, images: Inputs) -> Tensor:
        """[B] the class with the largest logit for each image; -1 where logits are not finite."""
        return classify(self.net(images))
