"""Builds the networks: ANML (a gated prediction network) and the OML network it is compared with.

A network is a chain of layers in the order of the released parameter list. `--rln N` cuts the chain
after N layers: `lower` runs the frozen part, `forward` the rest, and `trained_parameters` names what
the rest may change. Training and meta-test run the frozen part once per image.

To add a network, write a class with `lower` and `forward`, and enter it in `NETWORKS`.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

from model import layers
from model.layers import Conv, Linear
from utils.errors import UserError

State = tuple[Tensor, ...]
"""What `lower` leaves for `forward`: tensors that share their first dimension, one row per image."""

SPATIAL = 9  # a 28x28 image leaves the convolutions as 3x3 positions


class Network(nn.Module):
    """What ANML and OML have in common; see the module's docstring.

    Attributes:
        rln_training: default `--rln` of meta-training (the inner loop changes the layers above).
        rln_meta_test: default `--rln` of meta-test, the paper's main treatment of this network.
        widths: the arguments this network was built with, as a checkpoint stores them.
    """

    rln_training: ClassVar[int]
    rln_meta_test: ClassVar[int]
    widths: dict[str, int]
    head: Linear

    @property
    def num_layers(self) -> int:
        """Layers with parameters, two parameters each; `--rln` may freeze all but the last."""
        return sum(1 for _ in self.parameters()) // 2

    def lower(self, images: Tensor, rln: int) -> State:
        """Output of the first `rln` layers for `images` [B, 1 or 3, 28, 28] in the released scale."""
        raise NotImplementedError

    def features(self, state: State, rln: int = 0) -> tuple[Tensor, Tensor | None]:
        """Input of the head, before its gate, and the gate (None without one): each [B, F]."""
        raise NotImplementedError

    def forward(self, state: Tensor | State, rln: int = 0, head: bool = True) -> Tensor:
        """Logits [B, num_classes] from images, or from what `lower(images, rln)` returned.

        Without `head`, what would enter it: [B, F].
        """
        if isinstance(state, Tensor):
            state = self.lower(state, rln)
        features, gate = self.features(state, rln)
        if gate is not None:
            features = features * gate
        logits: Tensor = self.head(features) if head else features
        return logits


class ANML(Network):
    """Neuromodulatory network (NM) that gates the features of a prediction network (PLN).

    Paper, section 3 and figure 1; the released code calls it `Neuromodulation`. At the published
    widths (112, 256, 1000) it has 2,554,560 + 3,493,864 parameters.
    """

    rln_training = 7  # NM does not change in the inner loop
    rln_meta_test = 13  # only the head does

    def __init__(self, nm_channels: int = 112, pln_channels: int = 256, num_classes: int = 1000) -> None:
        super().__init__()
        self.widths = {
            "nm_channels": nm_channels,
            "pln_channels": pln_channels,
            "num_classes": num_classes,
        }
        features = pln_channels * SPATIAL
        gate = Linear(nm_channels * SPATIAL, features, activation="sigmoid")
        self.nm = nn.Sequential(OrderedDict(layers.trunk(nm_channels), gate=gate))
        self.pln = nn.Sequential(OrderedDict(layers.trunk(pln_channels)))
        self.head = Linear(features, num_classes)

    def lower(self, images: Tensor, rln: int) -> State:
        nm = layers.run(self.nm, images, stop=rln)
        return nm, layers.run(self.pln, images, stop=max(rln - len(self.nm), 0))

    def features(self, state: State, rln: int = 0) -> tuple[Tensor, Tensor | None]:
        nm, pln = state
        gate = layers.run(self.nm, nm, start=rln)
        return layers.run(self.pln, pln, start=rln - len(self.nm)).flatten(1), gate


class OML(Network):
    """The OML network of the released code: six convolutions, a hidden layer, a head; no norm, no gate.

    Javed and White, *Meta-learning representations for continual learning* (2019).
    """

    rln_training = 6  # the convolutions do not change in the inner loop
    rln_meta_test = 6

    def __init__(self, pln_channels: int = 256, num_classes: int = 1000, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * pln_channels if hidden is None else hidden
        self.widths = {"pln_channels": pln_channels, "num_classes": num_classes, "hidden": hidden}
        strides = (1, 1, 1, 2, 1, 2)
        body: OrderedDict[str, nn.Module] = OrderedDict()
        for i, stride in enumerate(strides):
            body[f"conv{i + 1}"] = Conv(pln_channels if i else 3, pln_channels, stride)
        body["linear"] = Linear(pln_channels * SPATIAL, hidden, activation="relu")
        self.body = nn.Sequential(body)
        self.head = Linear(hidden, num_classes)

    def lower(self, images: Tensor, rln: int) -> State:
        return (layers.run(self.body, images, stop=rln),)

    def features(self, state: State, rln: int = 0) -> tuple[Tensor, Tensor | None]:
        return layers.run(self.body, state[0], start=rln).flatten(1), None


NETWORKS: dict[str, type[Network]] = {"ANML": ANML, "OML": OML}
"""Network names as checkpoints and `--treatment` spell them."""


def build(name: str, widths: dict[str, int], generator: torch.Generator) -> Network:
    """A new network with random weights: Kaiming normal (fan-in, gain sqrt 2), zero biases and shifts,
    unit scales, drawn on the CPU so that a seed means the same weights on every device.

    Args:
        name: a key of `NETWORKS`.
        widths: keyword arguments of its class.
        generator: source of the weights.
    """
    net = NETWORKS[name](**widths)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            initialise(name, parameter, generator)
    return net.to(memory_format=torch.channels_last)


def initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Give a parameter the value it has in a new network, in place."""
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.ndim == 1:  # the scale of a norm
        parameter.fill_(1)
    else:
        redraw(parameter, generator)


def restore(name: str, widths: dict[str, int], weights: dict[str, Tensor], source: str) -> Network:
    """The network of a checkpoint.

    Args:
        name: its entry in `NETWORKS`.
        widths: keyword arguments of its class.
        weights: state dict.
        source: where all this comes from, for the error message.

    Raises:
        UserError: unknown network, or weights that do not fit it.
    """
    if name not in NETWORKS:
        raise UserError(f"{source} holds a network {name!r}; known are {', '.join(NETWORKS)}")
    try:
        with torch.device("meta"):
            net = NETWORKS[name](**widths)
        net.load_state_dict(weights, assign=True)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{source} does not hold the weights of {name} {widths}: {reason}") from None
    return net.float().to(memory_format=torch.channels_last).requires_grad_()


def fingerprint(net: Network) -> str:
    """sha256 hex digest of the weights: equal for equal bits."""
    digest = hashlib.sha256()
    for weight in net.parameters():
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def redraw(weight: Tensor, generator: torch.Generator, rows: list[int] | None = None) -> None:
    """Draw `weight`, or those `rows` of it, anew from the Kaiming normal distribution, in place.

    Fan-in is the number of inputs of one row, gain sqrt 2 (released code: `kaiming_normal_`). The
    numbers are drawn on the CPU in the precision of the weight.
    """
    shape = weight.shape if rows is None else (len(rows), *weight.shape[1:])
    std = math.sqrt(2 / math.prod(weight.shape[1:]))
    draw = torch.randn(shape, generator=generator, dtype=weight.dtype).mul_(std)
    with torch.no_grad():
        if rows is None:
            weight.copy_(draw)
        else:
            for row, values in zip(rows, draw, strict=True):
                weight[row].copy_(values)


def trained_parameters(net: Network, rln: int) -> list[str]:
    """Names of the parameters that learn when `--rln` freezes the first `rln` layers, in order.

    | `--rln` | ANML trains | OML trains |
    |---|---|---|
    | 0 | everything | everything |
    | 6 | NM's gate layer, the PLN, the head | hidden layer and head |
    | 7 | the PLN and the head | the head |
    | 13 | the head | - |

    Other numbers cut between two layers in the same order (`nm`, `pln`, `head`; `body`, `head`).

    Raises:
        UserError: no such cut in this network.
    """
    if not 0 <= rln < net.num_layers:
        raise UserError(
            f"--rln {rln} leaves nothing to train in {type(net).__name__}: "
            f"it has {net.num_layers} layers, so --rln goes from 0 to {net.num_layers - 1}"
        )
    return [name for name, _ in net.named_parameters()][2 * rln :]
