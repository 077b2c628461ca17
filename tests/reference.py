"""A plain reference of the method, to prove the project against and to time it against.

Written for reading: one image at a time, one operation at a time, weights as a list in the released
order (index i here is `vars[i]` there), nothing shared with the project's own code. In float64 it
says what the numbers are; in float32 it is the textbook implementation of the benchmark.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

OML_STRIDES = (1, 1, 1, 2, 1, 2)


def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise one sample [1, C, H, W] by its own mean and biased variance over H x W."""
    mean = x.mean((2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((2, 3), keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def trunk(weights: list[Tensor], x: Tensor) -> Tensor:
    """Three blocks of convolution, norm, ReLU (and max-pool in the first two): [1, C * 9]."""
    for block in range(3):
        kernel, bias, scale, shift = weights[4 * block : 4 * block + 4]
        x = F.relu(normalise(F.conv2d(x, kernel, bias), scale, shift))
        if block < 2:
            x = F.max_pool2d(x, 2)
    return x.flatten(1)


def anml_logits(weights: list[Tensor], image: Tensor) -> Tensor:
    """Logits [1000] of one image [3, 28, 28]; 28 weights."""
    x = image[None]
    gate = torch.sigmoid(F.linear(trunk(weights[:12], x), weights[12], weights[13]))
    features = trunk(weights[14:26], x)
    return F.linear(features * gate, weights[26], weights[27])[0]


def oml_logits(weights: list[Tensor], image: Tensor) -> Tensor:
    """Logits [1000] of one image [3, 28, 28]; 16 weights."""
    x = image[None]
    for layer, stride in enumerate(OML_STRIDES):
        x = F.relu(F.conv2d(x, weights[2 * layer], weights[2 * layer + 1], stride=stride))
    x = F.relu(F.linear(x.flatten(1), weights[12], weights[13]))
    return F.linear(x, weights[14], weights[15])[0]


def logits_of(weights: list[Tensor], image: Tensor) -> Tensor:
    """Logits of the network that the number of weights says."""
    return anml_logits(weights, image) if len(weights) == 28 else oml_logits(weights, image)


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Minus the log of the softmax probability of `label`."""
    return torch.logsumexp(logits, 0) - logits[label]


def inner_loop(
    weights: list[Tensor],
    images: Tensor,
    labels: list[int],
    lr: float,
    rln: int,
    second_order: bool,
) -> list[Tensor]:
    """The fast weights after one SGD step per image on all weights from index 2 * rln."""
    weights = list(weights)
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(logits_of(weights, image), label)
        trained = weights[2 * rln :]
        gradients = torch.autograd.grad(loss, trained, create_graph=second_order)
        for i, (weight, gradient) in enumerate(zip(trained, gradients, strict=True)):
            weights[2 * rln + i] = weight - lr * (gradient if second_order else gradient.detach())
    return weights


def meta_gradient(
    weights: list[Tensor],
    query: Tensor,
    labels: list[int],
    steps: int,
    lr: float,
    rln: int,
    second_order: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Mean query loss after the inner loop over the last `steps` query images, and its gradient
    with respect to the initial weights."""
    initial = [weight.detach().requires_grad_() for weight in weights]
    fast = inner_loop(initial, query[-steps:], labels[-steps:], lr, rln, second_order)
    total = torch.zeros((), dtype=query.dtype)
    for image, label in zip(query, labels, strict=True):
        total = total + cross_entropy(logits_of(fast, image), label)
    loss = total / len(labels)
    return loss.detach(), list(torch.autograd.grad(loss, initial))


def unrolled(
    net: nn.Module,
    names: Collection[str],
    query: Tensor,
    labels: Tensor,
    sizes: Mapping[str, Tensor],
    last: int,
    momentum: float = 0,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Mean query loss of any network after the inner loop over the last three query images, the losses before
    the inner steps, and the gradient of the first with respect to all parameters, the query if it takes one,
    and those of `sizes` that do.

    Args:
        names: the parameters that the inner loop changes, each in all modules that hold it.
        sizes: their step sizes.
        last: inner steps whose gradients are differentiated; those of the others are constants.
        momentum: part of the velocity that an inner step keeps.
    """
    net = copy.deepcopy(net)
    learned = dict(net.named_parameters())
    current: dict[str, Tensor] = {name: learned[name] for name in names}
    homes: list[tuple[dict[str, Any], str, str]] = [
        (module._parameters, key, name)
        for module in net.modules()
        for key, parameter in module._parameters.items()
        for name in names
        if parameter is current[name]
    ]
    unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    losses, velocity = [], dict.fromkeys(names, torch.zeros(()))
    for t in (-3, -2, -1):
        loss = F.cross_entropy(net(query[t][None]), labels[t][None])
        losses.append(loss.detach())
        grads = torch.autograd.grad(loss, list(current.values()), create_graph=True, **unused)
        for name, grad in zip(names, grads, strict=True):
            velocity[name] = (grad if -t <= last else grad.detach()) + momentum * velocity[name]
            current[name] = current[name] - sizes[name] * velocity[name]
        for table, key, name in homes:
            table[key] = current[name]
    loss = F.cross_entropy(net(query), labels)
    inputs = [*learned.values(), *(value for value in (query, *sizes.values()) if value.requires_grad)]
    return loss, torch.stack(losses), torch.autograd.grad(loss, inputs, **unused)


def log_density(
    head: str, query: Tensor, images: Tensor, prior: tuple[float, float], count: int | None = None
) -> Tensor:
    """Log density of features [F] in a class of images [K, F], by the books: normal with the most likely
    precision (`map`) or Student t (`predictive`). `prior`, inverse gamma, is that of each variance; a class's
    own variance counts as that of `count` images, K by default."""
    count = count or len(images)
    mean, variance = images.mean(0), images.var(0)
    shape, scale = prior[0] + count / 2, prior[1] + variance * (count - 1) / 2
    density: torch.distributions.Distribution = torch.distributions.Normal(mean, (scale / (shape - 1)).sqrt())
    if head == "predictive":
        density = torch.distributions.StudentT(2 * shape, mean, (scale / shape).sqrt())
    return density.log_prob(query).sum()


class Adam:
    """Adam as its paper writes it (Kingma and Ba, algorithm 1), one operation at a time."""

    def __init__(self, weights: list[Tensor], lr: float) -> None:
        self.lr = lr
        self.t = 0
        self.m = [torch.zeros_like(weight) for weight in weights]
        self.v = [torch.zeros_like(weight) for weight in weights]

    def step(self, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        self.t += 1
        stepped = []
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * gradient
            self.v[i] = 0.999 * self.v[i] + 0.001 * gradient * gradient
            m = self.m[i] / (1 - 0.9**self.t)
            v = self.v[i] / (1 - 0.999**self.t)
            stepped.append(weight - self.lr * m / (torch.sqrt(v) + 1e-8))
        return stepped


def meta_test_update(
    weights: list[Tensor], image: Tensor, label: int, rln: int, optimizer: Adam
) -> list[Tensor]:
    """One example of meta-test: forward through everything, gradient of all weights from 2 * rln on."""
    trained = [weight.detach().requires_grad_() for weight in weights[2 * rln :]]
    loss = cross_entropy(logits_of([*weights[: 2 * rln], *trained], image), label)
    gradients = list(torch.autograd.grad(loss, trained))
    with torch.no_grad():
        return [*weights[: 2 * rln], *optimizer.step(trained, gradients)]
