"""Builds the networks: ANML (a gated prediction network), what it is compared with, and yours.

A network is a class in `NETWORKS` with `head` and `forward(images) -> logits`. Everything else has
defaults in `Network`; see `docs/extending.md`. `--rln N` counts its layers in `layer_parameters`, and
nowhere else.
"""

import functools
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from datasets.images import OMNIGLOT, SIZE, SIZES, Normalisation
from model.layers import FrozenOutput, Inputs, conv_blocks, kaiming_normal, layers_of, outputs, run_rest
from model.layers import layer_parameters as layer_parameters
from model.layers import shared_copy as shared_copy
from model.layers import trained_parameters as trained_parameters
from utils.errors import UserError, reason
from utils.files import Checkpoint, load_checkpoint
from utils.flag import Range

FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)

Method = TypeVar("Method", bound=Callable[..., Any])
BLOCKS = range(1, 8)  # images of 512 have seven, of other sizes some of these

PLNChannels = Annotated[int, "channels of each convolution of the prediction network", Range(1)]
NumClasses = Annotated[
    int, "outputs of the head, or as many as there are classes to learn where these are more", Range(1)
]


def _on_colour(method: Method) -> Method:
    """A method of a `Network` that is given grey images with as many channels as the first convolution reads,
    as a view.

    The method raises ValueError for images of another size or with other channels. What a network's own
    `frozen` made of images passes as it is.
    """

    @functools.wraps(method)
    def wrapped(net: "Network", inputs: Inputs, *args: Any) -> Any:
        own, size = type(net).frozen is not Network.frozen, net.image_size
        if isinstance(inputs, Tensor) and (not own or inputs.shape[1:] == (1, size, size)):
            channels = net._channels
            if channels is not None and inputs.ndim == 4 and inputs.shape[1] == 1:
                inputs = inputs.expand(-1, channels, -1, -1)
            if channels is not None and inputs.shape[-3:] != (channels, size, size):
                raise ValueError(
                    f"images are {list(inputs.shape)}; {net.network} reads [B, {channels}, {size}, {size}], "
                    f"or grey ones [B, 1, {size}, {size}]"
                )
        return method(net, inputs, *args)

    return cast(Method, wrapped)


class Network(nn.Module):
    """What all networks have in common, with its defaults.

    `__init__` takes whole numbers, floats, booleans and texts, which become flags of the scripts. An argument
    `size` is none of these: it gets the side S of the images in pixels. Images come as [B, 1, S, S] or
    [B, 3, S, S], normalised; grey ones reach its methods with as many equal channels as the first convolution
    reads.

    Attributes:
        head: the last layer, with an output for each class; it starts anew at meta-test. Its number of
            outputs is its `out_features` or, without that, the constructor's `num_classes`.
        rln_training: default `--rln` of meta-training (the inner loop changes the layers above).
        rln_meta_test: default `--rln` of meta-test; None trains the head alone.
        model_name: default of `--model_name`; None for `<network>_Model.net`.
        kaiming: initial weights are Kaiming normal, biases zero, scales one, as published; otherwise
            they are those of the constructor, drawn from the run's generator.
        chains: names of the `nn.Sequential`s that images enter, whose stages `frozen` may run.
        no_effect: names of trained parameters that are known to have no effect.
        widths: the constructor's arguments but `size`, as a model file stores them.
        image_size: side of its images, in pixels.
        normalisation: of the images that it was trained on.
    """

    head: nn.Module
    widths: dict[str, Any]
    image_size: int = SIZE
    normalisation: Normalisation = OMNIGLOT
    rln_training: ClassVar[int] = 0
    rln_meta_test: ClassVar[int | None] = None
    model_name: ClassVar[str | None] = None
    kaiming: ClassVar[bool] = False
    chains: ClassVar[tuple[str, ...]] = ()
    no_effect: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Network":
        """Note the constructor's arguments (a copy comes without, and with `widths` of its own)."""
        net = super().__new__(cls)
        with suppress(TypeError):  # `__init__` is about to say what is wrong with them
            bound = inspect.signature(cls.__init__).bind(net, *args, **kwargs)
            bound.apply_defaults()
            given = list(bound.arguments.items())[1:]
            widths = {name: value for name, value in given if value is not None}
            net.__dict__["image_size"] = widths.pop("size", SIZE)
            net.__dict__["widths"] = widths
        return net

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would hide a method or property of this class, or be hidden by one.

        Raises:
            UserError: the name is taken.
        """
        used = getattr(Network, name, None)
        hidden = hasattr(Network, name) and isinstance(value, nn.Module | nn.Parameter)
        noted = name in ("widths", "image_size")
        if noted or inspect.isroutine(used) or isinstance(used, property) or hidden:
            raise UserError(
                f"{type(self).__name__}: the name `self.{name}` is taken, Network uses it: call it otherwise"
            )
        super().__setattr__(name, value)

    def __init_subclass__(cls) -> None:
        for name in ("forward", "frozen", "features", "gate", "features_before_gate"):
            if name in cls.__dict__:
                setattr(cls, name, _on_colour(cls.__dict__[name]))

    @_on_colour
    def frozen(self, images: Tensor, trained: Collection[str]) -> Inputs:
        """What `forward` may be given in place of `images`, computed without the parameters `trained`.

        An option, for speed: the stages of each of `chains` that come before the first with a parameter of
        `trained` are applied once per image, not at every step. `run_rest` goes on from there. Without
        chains, images themselves. The images that a batch holds must not depend on each other: in training, a
        stage with buffers (batch norm) is not applied either.
        """
        learning = {id(self.get_parameter(name)) for name in trained}
        activations, done = [], []
        for chain in self.chains:
            x, count = images, 0
            for stage in getattr(self, chain):
                keeps = self.training and any(True for _ in stage.buffers())
                if keeps or any(id(parameter) in learning for parameter in stage.parameters()):
                    break
                x, count = stage(x), count + 1
            activations.append(x)
            done.append(count)
        return FrozenOutput(tuple(activations), tuple(done)) if self.chains else images

    def features(self, inputs: Any) -> Tensor:
        """[B, F] what enters the head, of images or of what `frozen` made of them."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self(inputs)
        finally:
            hook.remove()
        return seen[-1].flatten(1)

    def gate(self, inputs: Any) -> Tensor | None:
        """[B, ...] what multiplies features, for statistics and pictures; None in a network without it."""
        return None

    def features_before_gate(self, inputs: Any) -> Tensor:
        """[B, F] features as they would be with an open gate; those of :meth:`features` without one."""
        return self.features(inputs)

    @functools.cached_property  # each forward call asks, thousands of times a second
    def _channels(self) -> int | None:
        """Channels that the first convolution reads; None without one."""
        return next((m.in_channels for m in self.modules() if isinstance(m, nn.Conv2d)), None)

    def penalty(self) -> Tensor | None:
        """A number that each step of an outer loop adds to its loss; None for none."""
        return None

    @property
    def network(self) -> str:
        """The name of this network in `NETWORKS`, as model files and `--treatment` spell it."""
        return next((name for name, kind in NETWORKS.items() if kind is type(self)), type(self).__name__)

    @property
    def num_outputs(self) -> int:
        """Outputs of the head, one for each class.

        Raises:
            ValueError: neither the head nor the constructor says.
        """
        outputs = getattr(getattr(self, "head", None), "out_features", None) or self.widths.get("num_classes")
        if outputs is None:
            raise ValueError(f"{self.network}: give the head out_features, or __init__ num_classes")
        return int(outputs)

    @property
    def default_meta_test_rln(self) -> int:
        """`--rln` of the main treatment: `rln_meta_test`, or all layers but those of the head."""
        return self.layers_below_head if self.rln_meta_test is None else self.rln_meta_test

    @property
    def layers_below_head(self) -> int:
        """`--rln` of a treatment in which nothing but the head is new or learns."""
        return len(layers_of(self)[0])

    @property
    def has_gate(self) -> bool:
        """Whether :meth:`gate` gives one."""
        return type(self).gate is not Network.gate


class _Published(Network):
    """A head on features, which are what the first chain puts out, and Kaiming normal weights."""

    kaiming = True

    def features(self, inputs: Inputs) -> Tensor:
        return run_rest(getattr(self, self.chains[0]), inputs, 0)

    def forward(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self.head(self.features(inputs))
        return logits


class ANML(_Published):
    """Neuromodulatory network (NM) that gates the features of a prediction network (PLN).

    Paper, section 3 and figure 1; the released code calls it `Neuromodulation`. At the published
    widths (112, 256, 1000) it has 2,554,560 + 3,493,864 parameters.
    """

    rln_training = 7  # NM does not change in the inner loop
    model_name = "Neuromodulation_Model.net"
    chains = ("nm", "pln")
    no_effect = tuple(f"{part}.block{k}.conv.bias" for part in ("nm", "pln") for k in BLOCKS)

    def __init__(
        self,
        nm_channels: Annotated[int, "channels of each convolution of the NM", Range(1)] = 112,
        pln_channels: PLNChannels = 256,
        num_classes: NumClasses = 1000,
        size: int = SIZE,
    ) -> None:
        super().__init__()
        self.nm = nn.Sequential(conv_blocks(nm_channels, size))
        self.pln = nn.Sequential(conv_blocks(pln_channels, size))
        features = outputs(self.pln, size)
        self.nm.add_module("gate", nn.Linear(outputs(self.nm, size), features))
        self.nm.add_module("sigmoid", nn.Sigmoid())
        self.head = nn.Linear(features, num_classes)

    def features(self, inputs: Inputs) -> Tensor:
        return self.features_before_gate(inputs) * self.gate(inputs)

    def gate(self, inputs: Inputs) -> Tensor:
        return run_rest(self.nm, inputs, 0)

    def features_before_gate(self, inputs: Inputs) -> Tensor:
        return run_rest(self.pln, inputs, 1)


class SANML(_Published):
    """ANML without its neuromodulatory network: the prediction network alone.

    The inner loop trains all of it.

    Frati et al., *Reset it and forget it: relearning last-layer weights improves continual and transfer
    learning* (2024), where it is called sANML.
    """

    chains = ("pln",)
    no_effect = tuple(f"pln.block{k}.conv.bias" for k in BLOCKS)

    def __init__(
        self, pln_channels: PLNChannels = 256, num_classes: NumClasses = 1000, size: int = SIZE
    ) -> None:
        super().__init__()
        self.pln = nn.Sequential(conv_blocks(pln_channels, size))
        self.head = nn.Linear(outputs(self.pln, size), num_classes)


class OML(_Published):
    """The OML network of the released code: six convolutions, a hidden layer, a head; no norm, no gate.

    Javed and White, *Meta-learning representations for continual learning* (2019). Sizes nearer to 84 than to
    28 have the strides of their code, which leave 3 x 3 positions of 84.
    """

    rln_training = 6  # the convolutions do not change in the inner loop
    rln_meta_test = 6
    chains = ("body",)

    def __init__(
        self,
        pln_channels: PLNChannels = 256,
        num_classes: NumClasses = 1000,
        hidden: Annotated[int | None, "outputs of the first linear layer", Range(1)] = None,
        size: int = SIZE,
    ) -> None:
        super().__init__()
        hidden = 4 * pln_channels if hidden is None else hidden
        self.body = nn.Sequential()
        for i, stride in enumerate((2, 1, 2, 1, 2, 2) if size > 56 else (1, 1, 1, 2, 1, 2)):
            conv = nn.Conv2d(pln_channels if i else 3, pln_channels, kernel_size=3, stride=stride)
            self.body.add_module(f"conv{i + 1}", conv)
            self.body.add_module(f"relu{i + 1}", nn.ReLU())
        self.body.add_module("flatten", nn.Flatten())
        self.body.add_module("linear", nn.Linear(outputs(self.body, size), hidden))
        self.body.add_module("relu7", nn.ReLU())
        self.head = nn.Linear(hidden, num_classes)


class Conv4(_Published):
    """Four blocks of a padded 3x3 convolution, batch norm, ReLU and 2x2 max-pool, and a head.

    What most work on few images compares with (Vinyals et al., *Matching networks for one shot learning*,
    2016, and Snell et al., 2017). At 84 pixels it has 1,600 features, at 28 it has 64. The norm takes the
    place of the convolutions' biases.
    """

    chains = ("body",)

    def __init__(
        self,
        channels: Annotated[int, "channels of each convolution", Range(1)] = 64,
        num_classes: NumClasses = 1000,
        size: int = SIZE,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for k in range(4):
            conv = nn.Conv2d(channels if k else 3, channels, kernel_size=3, padding=1, bias=False)
            rest = {"norm": nn.BatchNorm2d(channels), "relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}
            self.body.add_module(f"block{k + 1}", nn.Sequential(OrderedDict(conv=conv, **rest)))
        self.body.add_module("flatten", nn.Flatten())
        # Outputs take this order from the kernels, and the CPU normalises and pools them faster in it.
        self.body.to(memory_format=torch.channels_last)
        self.head = nn.Linear(outputs(self.body, size), num_classes)


NETWORKS: dict[str, type[Network]] = {"ANML": ANML, "sANML": SANML, "OML": OML, "Conv4": Conv4}
"""The registry: network names as model files and `--treatment` spell them."""


def build(name: str, widths: Mapping[str, Any], generator: torch.Generator, size: int = SIZE) -> Network:
    """A new network with random weights, drawn on the CPU, so that a seed means the same weights on every
    device.

    Args:
        name: a key of `NETWORKS`.
        widths: arguments of its class, but `size`.
        generator: source of the weights.
        size: side of its images, in pixels.

    Raises:
        UserError: its constructor fails, say since no positions are left at this size.
    """
    kind = NETWORKS[name]
    try:
        net = _construct(kind, widths, size, None if kind.kaiming else generator)
        if kind.kaiming:
            reset_parameters(net, [name for name, _ in net.named_parameters()], generator)
        assert net.num_outputs > 0, "its head has no outputs"
    except FAILURES as error:
        raise UserError(f"network {name} cannot be built with {dict(widths)}: {reason(error)}") from error
    return net


def _construct(
    kind: type[Network], widths: Mapping[str, Any], size: int, generator: torch.Generator | None = None
) -> Network:
    """A network for images of a size, which its constructor gets where it asks for it.

    Torch's own generator draws the weights. That generator is seeded by `generator` or with 0, and afterwards
    left as it was.
    """
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    asks = "size" in inspect.signature(kind).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind(**widths, size=size) if asks else kind(**widths)
    net.__dict__["image_size"] = size
    for parameter in net.parameters():  # one number for each place in memory, which a part of a tensor lacks
        parameter.data = parameter.data.clone()
    return net


def image_arguments(net: Network) -> dict[str, Any]:
    """The arguments in a model file that say which images the network takes; `restore` reads them."""
    return {**net.normalisation.arguments(), "size": net.image_size}


@torch.no_grad()
def reset_parameters(
    net: Network, names: Collection[str], generator: torch.Generator, rows: list[int] | None = None
) -> None:
    """Give parameters, or some of their rows, their values in a new network, in place (Scratch)."""
    fresh = None if net.kaiming else _construct(type(net), net.widths, net.image_size, generator)
    for name in names:
        parameter = net.get_parameter(name)
        if fresh is not None:
            values: Tensor = fresh.get_parameter(name)
            values = values if rows is None else values[rows]
        elif name.endswith("bias"):
            values = torch.zeros_like(parameter)
        elif parameter.ndim < 2:  # the scale of a norm
            values = torch.ones_like(parameter)
        else:
            shape = parameter.shape if rows is None else (len(rows), *parameter.shape[1:])
            values = kaiming_normal(parameter.new_empty(shape), generator)
        if rows is None:
            parameter.copy_(values)
        else:
            for row, value in zip(rows, values, strict=True):
                parameter[row].copy_(value)


def reset_head(net: Network, generator: torch.Generator, classes: list[int] | None = None) -> None:
    """Draw the head's rows anew, in place: those of `classes` (weights alone) or all (and biases).

    Rows are what the head has one of for each class. What all classes share, say a temperature, stays.
    In the published networks, weights are Kaiming normal and biases zero; in others rows are those of a
    new network. (Released code: `reset_classifer`, which leaves biases alone as well.)
    """
    reset_parameters(net, head_rows(net, biases=classes is None), generator, classes)


def head_rows(net: Network, biases: bool = False) -> list[str]:
    """Names of the head's parameters [outputs, ...] that have a row for each class; with `biases` also of
    those that have a number for each."""
    return [
        f"head.{name}"
        for name, p in net.head.named_parameters()
        if p.requires_grad and p.ndim > (not biases) and len(p) == net.num_outputs
    ]


def restore(saved: Checkpoint, source: str | Path) -> Network:
    """The network of a model file or training state, in float32.

    Args:
        source: where the content comes from, for the error message.

    Raises:
        UserError: unknown network, or weights that do not fit it.
    """
    if saved.network not in NETWORKS:
        raise UserError(f"{source} holds a network {saved.network!r}; known are {', '.join(NETWORKS)}")
    kind, widths = NETWORKS[saved.network], dict(saved.widths)
    try:
        size = saved.arguments.get("size") or SIZE  # files without it are of 28
        if not (isinstance(size, int) and SIZES[0] <= size <= SIZES[1]):
            raise ValueError(f"its size {size} is no number from {SIZES[0]} to {SIZES[1]}")
        if kind.kaiming:  # whether all fits, before memory is taken for what a damaged file may ask for
            with torch.device("meta"):
                _construct(kind, widths, size).load_state_dict(dict(saved.state_dict), assign=True)
        # Constructed, not assigned: parameters that are one stay one, and what no file holds is there.
        net = _construct(kind, widths, size)
        net.load_state_dict(dict(saved.state_dict))
        net.normalisation = Normalisation.of(saved.arguments)
    except FAILURES as error:  # of load_state_dict the last line says most
        why = (str(error).splitlines() or [reason(error)])[-1].strip()
        raise UserError(f"{source} does not hold a network {saved.network} {widths}: {why}") from None
    return net


def load_network(path: str | Path) -> Network:
    """The network in a model file, on the CPU, ready to look at images (`eval`).

        net = load_network("pretrained/anml_omniglot.net")
        images = normalise(pixels, net.normalisation)    # of datasets.images; uint8 [B, S, S]
        logits, features, gate = net(images), net.features(images), net.gate(images)

    Raises:
        UserError: no such file, or it is damaged or foreign. Nothing in it is run.
    """
    return restore(load_checkpoint(Path(path)), path).eval()


def fingerprint(net: Network) -> str:
    """sha256 hex digest of weights and buffers: equal for equal bits."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
