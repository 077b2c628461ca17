"""Networks of both backends, and such as the project does not have: exact, or refused in one clear line."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

import evaluate_classification
import mrcl_classification
from model.check import check_network
from model.fast import BACKENDS, conv, winograd
from model.fast.inner_loop import HandLearner
from model.learner import Given
from model.meta_test import FrozenOutputs, learn, new_run
from model.method import INNER_RULES, InnerLoop, MetaSGD, Params, kept_rule
from model.modelfactory import (
    NETWORKS,
    Network,
    build,
    layer_parameters,
    load_network,
    reset_head,
    trained_parameters,
)
from model.optimizer import Adam
from model.representation import represent
from tests.conftest import Call, Run, assert_same_run, pooled
from tests.model.test_method import WIDTHS, images, network
from tests.networks import OWN
from tests.reference import unrolled
from tools import check_network as check_tool
from utils.errors import UserError

KNOWN = "the fast backend is for ANML, sANML and OML alone"


class OwnFrozen(Network):
    """Its frozen part gives a tensor of activations, and its gate has batch norm."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(196, num_classes)
        self.passed = 0

    def frozen(self, images: Tensor, trained: Any) -> Tensor:
        self.passed += len(images)
        return images if any(name.startswith("trunk") for name in trained) else self.trunk(images)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.trunk(inputs) if inputs.ndim == 4 else inputs
        logits: Tensor = self.head(x * (1 + self.gate(inputs)))
        return logits

    def gate(self, inputs: Tensor) -> Tensor:
        return torch.sigmoid(self.trunk(inputs) if inputs.ndim == 4 else inputs)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in {**OWN, "OwnFrozen": OwnFrozen}.items():
        monkeypatch.setitem(NETWORKS, name, kind)


def new(name: str, **widths: Any) -> Network:
    return build(name, {**WIDTHS.get(name, {}), **widths}, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", [*WIDTHS, *OWN])
def test_check(name: str) -> None:
    check_network(name, WIDTHS.get(name), every_cut=True)


@pytest.mark.parametrize("last", [0, 2, None])
@pytest.mark.parametrize(
    ("name", "backend", "tiles"),
    [
        *((name, "plain", 0) for name in [*WIDTHS, *OWN]),
        *((name, "fast", tiles) for name in WIDTHS for tiles in (0, 760, 5)),
    ],
)
def test_meta_gradient_at_every_cut(
    name: str, backend: str, tiles: int, last: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the paper's rule, of images that may take a gradient; fast in colour as well, and with Winograd's
    gradients of so many tiles at a time. By the other rules at the network's own cut, in a second inner loop
    with one rule; gradients of learned step sizes are included."""
    if tiles:
        monkeypatch.setattr(conv, "FEW_POSITIONS", 0)
        monkeypatch.setattr(conv, "OF_AN_IMAGE", 0)
        monkeypatch.setattr(conv, "MANY_CHANNELS", 1)
        monkeypatch.setattr(winograd, "CHUNK", tiles)
    net, plain = (network(name, of)[0] if name in WIDTHS else new(name).double() for of in (backend, "plain"))
    labels = torch.tensor([0, 5, 3, 3, 4])
    cuts = range(1 if tiles else len(layer_parameters(net)))
    if backend == "fast":
        cases = [*itertools.product(cuts, ["sgd"], (1, 3))]
    else:
        cases = [*itertools.product(cuts, ["sgd"], [1]), (net.rln_training, "momentum", 1)]
        cases += [(net.rln_training, "meta_sgd", 1)]
    for rln, by, channels in cases:
        query = images(5, channels).squeeze(2).requires_grad_(last == 2)
        params: Params = {n: net.get_parameter(n) for n in trained_parameters(net, rln)}
        lr = 0.1 if by == "sgd" else 0.01
        inner, rule = kept_rule(InnerLoop(lr, last, INNER_RULES[by] if by != "sgd" else None), params)
        sizes = dict.fromkeys(params, torch.tensor(lr, dtype=torch.float64))
        learned = [*net.parameters(), *([query] if last == 2 else [])]
        if isinstance(rule, MetaSGD):
            generator = torch.Generator().manual_seed(2)
            for size in rule.parameters():
                size.data += 0.05 * torch.randn(size.shape, generator=generator, dtype=torch.float64)
            sizes, learned = {n: rule.inner_lr(n) for n in params}, [*learned, *rule.parameters()]
        for _ in range(1 + (by != "sgd")):
            torch.manual_seed(5)  # of dropout
            inputs = net.frozen(query, params)
            support = inputs[-3:], labels[-3:]
            loss, _, losses = BACKENDS[backend].meta_loss(net, params, support, (inputs, labels), inner)
        grads = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        torch.manual_seed(5)
        momentum = 0.9 if by == "momentum" else 0
        expected = unrolled(plain, params, query, labels, sizes, 3 if last is None else last, momentum)
        torch.testing.assert_close((loss, losses, grads), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "backend"), [*itertools.product(WIDTHS, BACKENDS), *((name, "plain") for name in OWN)]
)
def test_meta_test_updates(name: str, backend: str) -> None:
    """Adam and SGD of torch.optim on a whole plain copy in `eval` mode, at every cut, from images and from
    frozen outputs; the model, its buffers included, stays."""
    net, plain = (network(name, of)[0] if name in WIDTHS else new(name).double() for of in (backend, "plain"))
    before, labels = copy.deepcopy(net.state_dict()), torch.tensor([0, 0, 2, 1])
    index = torch.stack([labels, torch.tensor([1, 2, 3, 0])], 1)
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    for rln, kind in itertools.product(range(len(layer_parameters(net))), kinds):
        pool = images(3, 4) if kind == "adam" else images(3, 4, 3).squeeze(3)
        pixels, trained = pool[tuple(index.t())], trained_parameters(net, rln)
        run = new_run(net, trained, torch.Generator().manual_seed(1))
        shared = {n for n, p in run.named_parameters() if p.data_ptr() == net.get_parameter(n).data_ptr()}
        assert shared == dict(net.named_parameters()).keys() - set(trained)
        plain.eval().load_state_dict(run.state_dict())
        online = BACKENDS[backend].adam_learner(run, trained, Given(0.01), optimizer=kind)
        assert isinstance(online, HandLearner) == (backend == "fast")
        outputs = FrozenOutputs(net.eval(), pooled(pool), trained)
        learn(online, outputs, index[:1])
        online.learn(pixels[1:2], labels[1:2])
        learn(online, outputs, index[2:])

        optimizer = kinds[kind]([plain.get_parameter(n) for n in trained], lr=0.01)
        for image, label in zip(pixels, labels, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(plain(image[None]), label[None]).backward()
            optimizer.step()
        torch.testing.assert_close(run.state_dict(), plain.state_dict(), rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        for inputs in pixels, outputs.get(index):
            assert torch.equal(online.predict(inputs), plain(pixels).argmax(1))


def test_layers_are_modules_with_parameters_the_head_last(call: Call) -> None:
    """As the check of a network lists them."""
    tied = ["first.weight, first.bias", "body.0.weight, body.0.bias", "last.bias", "head.weight, head.bias"]
    odd = ["conv.weight", "prelu.weight", "norm.weight, norm.bias", "head.weight, head.bias"]
    for name, layers in (("Tied", tied), ("OddLayers", odd)):
        done = call(check_tool, name)
        assert done.returncode == 0, done.stderr
        said, *listed = done.stdout.splitlines()
        number = sum(p.numel() for p in new(name).parameters())
        assert said == f"{name}: {number:,} parameters in 4 layers, all checks passed"
        assert listed == [f"{position:3d}  {layer}" for position, layer in enumerate(layers)]
        assert new(name).default_meta_test_rln == 3


def test_initial_values_are_those_of_the_constructor_from_the_runs_generator() -> None:
    state = torch.random.get_rng_state()
    net, same = new("OddLayers", slope=0.1), new("OddLayers", slope=0.1)
    other = build("OddLayers", {}, torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.get_parameter("prelu.weight").item() == pytest.approx(0.1)
    assert net.get_parameter("norm.weight").eq(0.5).all()
    assert not net.get_parameter("head.weight").any()
    assert torch.equal(net.get_parameter("conv.weight"), same.get_parameter("conv.weight"))
    assert not torch.equal(net.get_parameter("conv.weight"), other.get_parameter("conv.weight"))


def test_a_head_of_ones_own_is_drawn_anew() -> None:
    """Rows of classes; what they share stays."""
    net = new("Cosine")
    with torch.no_grad():
        net.get_parameter("head.temperature").fill_(0.5)
    before = net.get_parameter("head.weight").detach().clone()
    reset_head(net, torch.Generator().manual_seed(0), [3, 5])
    changed = (net.get_parameter("head.weight") != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 5]
    reset_head(net, torch.Generator().manual_seed(0))
    assert (net.get_parameter("head.weight") != before).any(1).all()
    assert net.get_parameter("head.temperature").item() == 0.5


GATES = {"GroupNorm": 128, "FiLM": 6, "OwnFrozen": 196, "Tied": None, "ANML": 54}


@pytest.mark.parametrize("name", GATES)
def test_a_representation_is_what_enters_the_head(name: str) -> None:
    """And leaves training mode and buffers alone."""
    net, pixels, gates = new(name).train(), images(35, 4).float(), GATES[name]  # which pass in two parts
    before = copy.deepcopy(net.state_dict())
    assert net.has_gate == (gates is not None)
    seen = represent(net, pooled(pixels))
    assert net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    features = net.eval().features(pixels.flatten(0, 1)).detach()
    torch.testing.assert_close([*seen.values()][-1].rows, features)
    assert {pool.sizes for pool in seen.values()} == {(4,) * 35}
    assert (seen["gate"].rows.shape if "gate" in seen else None) == (gates and (140, gates))


@pytest.fixture
def scripts(run: Run, cache: Path) -> Run:
    """Runs a script in this process, where the networks above are registered."""
    return lambda script, *flags: run(script, *GLYPHS, f"--cache_dir={cache}", *flags)


GLYPHS = ("--dataset=glyphs", "--threads=1")
TEST = ("--schedule=2", "--runs=1", "--lr=0.01", "--test_classes=3", "--name=test")


@pytest.mark.parametrize(
    ("name", "learner"),
    [
        *((name, "--update_step=3 --remember=4") for name in ("GroupNorm", "Tied", "BatchNorm", "OddLayers")),
        ("BatchNorm", "--learner=iid --batch_size=8"),
    ],
)
def test_through_the_scripts_and_resume(name: str, learner: str, scripts: Run) -> None:
    """Networks with a gate, with shared parameters, with buffers and with an --rln of their own."""
    flags = [f"--treatment={name}", "--num_classes=20", "--train_classes=10", "--eval_every=2"]
    flags += [*learner.split(), "--eval_classes=2"]
    scripts(mrcl_classification, *flags, "--steps=2", "--name=part", f"--model_name={name}.net")
    scripts(mrcl_classification, "--resume=runs/part_0", "--steps=4")
    scripts(mrcl_classification, *flags, "--steps=4", "--name=whole", "--model_name=whole.net")
    assert_same_run(Path("runs/part_0"), Path("runs/whole_0"))
    config = json.loads(Path("runs/part_0/config.json").read_text())
    assert (config["backend"], config["backend_why"]) == ("plain", KNOWN)
    assert f"backend plain: {KNOWN}" in Path("runs/part_0/log.txt").read_text()
    scripts(evaluate_classification, f"--model={name}.net", *TEST)
    results = json.loads(Path("runs/test_0/results.json").read_text())
    assert (results["network"], results["rln"]) == (name, new(name).default_meta_test_rln)
    net = load_network(f"{name}.net")
    assert not net.training
    if "iid" in learner:
        assert results["treatment"] == "BatchNorm (pretrained) --rln 3"
        assert net.get_buffer("trunk.1.num_batches_tracked").item() == 4  # the buffer was trained and saved


class Sound(Network):
    """A hidden layer and a head, of which others change a method."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(784, 10)
        self.head = nn.Linear(10, num_classes)
        self.change()

    def change(self) -> None:
        pass

    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(images.flatten(1)))
        return logits


def drifting(net: Any, x: Tensor) -> Tensor:
    """Keeps something of what it has seen, even in eval mode."""
    net.seen = getattr(net, "seen", 0.0) + float(x.detach().mean())
    return net.layer(x) - net.seen  # type: ignore[no-any-return]


class Once(torch.autograd.Function):
    """Squares, whose author has thought of one derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]  # type: ignore[no-any-return]


def stops(net: Any) -> None:
    raise ValueError("width 3 of\n2 groups")


WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "other logits the second time": {"hidden": drifting},
    "alone than in a batch": {"hidden": lambda net, x: net.layer(x - x.mean(0))},
    "not finite": {"hidden": lambda net, x: net.layer(x) / 0},
    "parameters that it is handed": {
        "hidden": lambda net, x: F.linear(x, net.alias[0], net.layer.bias),
        "change": lambda net: setattr(net, "alias", [net.layer.weight]),
    },
    "neither a parameter nor a buffer": {
        "hidden": lambda net, x: net.layer(x) + net.offset,
        "change": lambda net: setattr(net, "offset", torch.randn(10)),
    },
    "layer.weight has no effect": {
        "hidden": lambda net, x: F.linear(x, net.layer.weight.data, net.layer.bias)
    },
    "--rln 1 the frozen part": {"frozen": lambda net, x, trained: x * (1 + ("layer.weight" not in trained))},
    "other.bias has no effect": {"change": lambda net: setattr(net, "other", nn.Linear(2, 2))},
    "row for each class": {
        "change": lambda net: net._modules.update(layer=nn.Linear(784, 20), head=nn.PReLU())
    },
    "built with {}: width 3 of 2 groups": {"change": stops},
    "no attribute 'head'": {"change": lambda net: delattr(net, "head")},
    "fails on 2 images of 28 x 28": {"change": lambda net: setattr(net, "layer", nn.Linear(100, 10))},
    r"forward gives \[20\]": {"forward": lambda net, x: net.head(net.layer(x.flatten(1))).mean(0)},
    "self.head": {
        "forward": lambda net, x: F.linear(net.layer(x.flatten(1)), net.head.weight, net.head.bias)
    },
    r"features gives \[1, 10\]": {"features": lambda net, x: net.layer(x.flatten(1))[:1]},
    "no second derivative: train with --first_order": {"hidden": lambda net, x: Once.apply(net.layer(x))},
    "penalty gives .*nan": {"penalty": lambda net: net.head.weight.sum() * torch.nan},
}


@pytest.mark.parametrize("says", WRONG)
def test_what_is_wrong_is_one_line(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Wrong", type("Wrong", (Sound,), WRONG[says]))
    with pytest.raises(UserError, match=f"network Wrong.*{says}") as error:
        check_network("Wrong")
    assert "\n" not in str(error.value)
    if "first_order" in says:
        check_network("Wrong", second_order=False)


def test_a_parameter_is_dense_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's pass over all weights takes memory as it comes."""
    part = {"change": lambda net: setattr(net.layer, "weight", nn.Parameter(torch.ones(10, 999)[:, :784]))}
    monkeypatch.setitem(NETWORKS, "Part", type("Part", (Sound,), part))
    net = build("Part", {}, torch.Generator())
    Adam(net.parameters(), lr=0.1).step([torch.ones_like(p) for p in net.parameters()])
    torch.testing.assert_close(net.get_parameter("layer.weight"), torch.full((10, 784), 0.9))


def test_a_frozen_part_that_is_a_tensor() -> None:
    """It passes the checks, and each image passes it once at meta-test."""
    check_network("OwnFrozen", every_cut=True)
    net = new("OwnFrozen").eval()
    assert isinstance(net, OwnFrozen)
    outputs = FrozenOutputs(net, pooled(images(3, 4).float()), ["head.weight", "head.bias"])
    index = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    net.passed = 0
    found = [net(outputs.get(index)) for _ in range(3)]
    assert net.passed == 12
    torch.testing.assert_close(found[0], net(images(12).float()))
    assert torch.equal(found[0], found[2])


def test_a_frozen_part_that_the_rest_does_not_go_on_from() -> None:
    """Wrong at a cut that training did not check, it ends an evaluation before a class is learned."""
    wrong = {"frozen": lambda net, x, trained: net.trunk(x) * (1 + ("gate" in trained))}
    net, pool = type("Wrong", (OwnFrozen,), wrong)().eval(), pooled(images(3, 4).float())
    FrozenOutputs(net, pool, ["head.weight"])
    with pytest.raises(UserError, match="network Wrong: the frozen part plus the rest gives other logits"):
        FrozenOutputs(net, pool, ["gate"])
