"""Networks that the project does not have: exact, through both scripts, or one clear line."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

import evaluate_classification
import mrcl_classification
import pretrain_classification
from datasets.task_sampler import sample_trajectory
from model.check import check_network
from model.fast import meta_loss, use_backend
from model.layers import ConvBlock
from model.learner import Settings
from model.meta_learner import MetaLearner
from model.meta_test import FrozenOutputs, adam_learner, learn, new_run
from model.method import Params
from model.modelfactory import (
    ANML,
    NETWORKS,
    Network,
    build,
    layer_parameters,
    load_network,
    reset_head,
    trained_parameters,
)
from model.representation import represent
from tests.conftest import Called, assert_same_run
from tests.model.test_method import images
from tests.networks import OWN
from tools import check_network as check_tool
from utils.errors import UserError

CPU = torch.device("cpu")
PUBLISHED: dict[str, dict[str, Any]] = {
    "ANML": {"nm_channels": 3, "pln_channels": 4, "num_classes": 20},
    "sANML": {"pln_channels": 4, "num_classes": 20},
    "OML": {"pln_channels": 4, "num_classes": 20},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in OWN.items():
        monkeypatch.setitem(NETWORKS, name, kind)


def new(name: str, backend: str = "plain", **widths: Any) -> Network:
    net = build(name, {**PUBLISHED.get(name, {}), **widths}, torch.Generator().manual_seed(3))
    use_backend(net, backend, CPU)
    return net


@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize("name", [*PUBLISHED, *OWN])
def test_check(name: str, backend: str) -> None:
    check_network(
        name,
        PUBLISHED.get(name),
        prepare=partial(use_backend, name=backend, device=CPU),
        meta_loss=meta_loss(backend),  # type: ignore[arg-type]
        every_cut=True,
    )


def unrolled(
    net: Network, names: list[str], query: Tensor, labels: Tensor, steps: int, first_order: bool
) -> Any:
    """Loss after SGD steps and its gradients in plain autograd, with parameters put into their modules."""
    net = copy.deepcopy(net)
    learned = dict(net.named_parameters())
    initial = {name: learned[name] for name in names}
    homes = {
        name: [
            (module, key)
            for module in net.modules()
            for key, p in module._parameters.items()
            if p is parameter
        ]
        for name, parameter in initial.items()
    }
    current: dict[str, Tensor] = dict(initial)
    for t in range(len(query) - steps, len(query)):
        loss = F.cross_entropy(net(query[t : t + 1]), labels[t : t + 1])
        grads = torch.autograd.grad(
            loss,
            list(current.values()),
            create_graph=not first_order,
            allow_unused=True,
            materialize_grads=True,
        )
        for (name, places), grad in zip(homes.items(), grads, strict=True):
            current[name] = current[name] - 0.1 * grad
            for module, key in places:
                module._parameters.pop(key, None)
                object.__setattr__(module, key, current[name])
    loss = F.cross_entropy(net(query), labels)
    return loss, torch.autograd.grad(loss, list(learned.values()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize("name", ["sANML", *OWN])
def test_meta_gradient_at_every_cut(name: str, backend: str, first_order: bool) -> None:
    net = new(name, backend).double()
    query, labels = images(5), torch.tensor([0, 5, 3, 3, 4])
    for rln in range(net.num_layers):
        names = trained_parameters(net, rln)
        params: Params = {n: net.get_parameter(n) for n in names}
        torch.manual_seed(5)  # of dropout
        inputs = net.frozen(query, params)
        support = inputs[-3:], labels[-3:]
        loss, _, _ = meta_loss(backend)(  # type: ignore[arg-type]
            net, params, support, (inputs, labels), inner_lr=0.1, first_order=first_order
        )
        learned = list(net.parameters())
        grads = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        torch.manual_seed(5)
        expected_loss, expected = unrolled(net, names, query, labels, 3, first_order)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize("name", OWN)
def test_meta_test_updates(name: str, backend: str) -> None:
    """Adam by torch.optim on a whole copy in `eval` mode; the model, its buffers included, stays."""
    net = new(name, backend).double()
    before = copy.deepcopy(net.state_dict())
    pool, index = images(3, 4), torch.tensor([[0, 1], [0, 2], [2, 3], [1, 0]])
    trained = trained_parameters(net, net.default_meta_test_rln)
    run = new_run(net, trained, torch.Generator().manual_seed(1))
    plain = copy.deepcopy(run)
    learn(adam_learner(run, trained, Settings(0.01)), FrozenOutputs(net.eval(), pool, trained), index)

    weights = [plain.get_parameter(n) for n in trained]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    for label, drawing in index.tolist():
        optimizer.zero_grad()
        F.cross_entropy(plain(pool[label, drawing][None]), torch.tensor([label])).backward()
        optimizer.step()
    torch.testing.assert_close(run.state_dict(), plain.state_dict(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_layers_are_modules_with_parameters_the_head_last() -> None:
    assert layer_parameters(new("OddLayers")) == [
        ["conv.weight"],
        ["prelu.weight"],
        ["norm.weight", "norm.bias"],
        ["head.weight", "head.bias"],
    ]
    assert layer_parameters(new("Tied")) == [
        ["first.weight", "first.bias"],
        ["body.0.weight", "body.0.bias"],
        ["last.bias"],
        ["head.weight", "head.bias"],
    ]
    assert new("Cosine").default_meta_test_rln == 1


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


def test_gates_have_a_place_in_the_representation() -> None:
    for name, size in (("GroupNorm", 128), ("FiLM", 6)):
        seen = represent(new(name), images(2, 3).float())
        assert seen.gate is not None
        assert seen.gate.rows.shape == (6, size)
        assert seen.after.sizes == seen.before.sizes == (3, 3)
    assert represent(new("Tied"), images(2, 3).float()).gate is None


class Scripts:
    """Both scripts and pretraining in this process, where the networks above are registered."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        self.cache, self.monkeypatch = cache, monkeypatch

    def __call__(self, script: Any, *flags: str) -> None:
        name = script.__name__ + ".py"
        self.monkeypatch.setattr(sys, "argv", [name, *flags])
        script.main()

    def data(self) -> list[str]:
        return ["--dataset=glyphs", f"--cache_dir={self.cache}", "--threads=1"]


@pytest.fixture
def scripts(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return Scripts(tmp_path, cache, monkeypatch)


@pytest.mark.parametrize("name", ["sANML", *OWN])
def test_through_the_scripts_and_resume(name: str, scripts: Scripts) -> None:
    narrow = ["--pln_channels=4"] if name == "sANML" else []
    small = [
        *scripts.data(),
        *narrow,
        "--num_classes=20",
        "--train_classes=10",
        "--update_step=3",
        "--remember=4",
    ]
    flags = [f"--treatment={name}", *small, "--eval_every=2", "--eval_classes=2", f"--model_name={name}.net"]
    scripts(mrcl_classification, *flags, "--steps=2", "--name=part")
    scripts(mrcl_classification, "--resume=runs/part_0", "--steps=4")
    scripts(mrcl_classification, *flags, "--steps=4", "--name=whole", "--model_name=whole.net")
    assert_same_run(Path("runs/part_0"), Path("runs/whole_0"))
    config = json.loads(Path("runs/part_0/config.json").read_text())
    assert config["backend"] == "fast"
    evaluation = ["--schedule=2", "--runs=1", "--lr=0.01", "--test_classes=3", "--name=test"]
    scripts(evaluate_classification, f"--model={name}.net", *scripts.data(), *evaluation)
    results = json.loads(Path("runs/test_0/results.json").read_text())
    assert results["network"] == name
    assert results["rln"] == new(name).default_meta_test_rln
    if name == "sANML":
        assert results["treatment"] == "sANML"


def test_pretraining(scripts: Scripts) -> None:
    flags = ["--treatment=BatchNorm", *scripts.data(), "--train_classes=10", "--batch_size=8"]
    scripts(pretrain_classification, *flags, "--images=24", "--model_name=p.net")
    evaluation = ["--schedule=2", "--runs=1", "--lr=0.01", "--test_classes=3", "--name=test"]
    scripts(evaluate_classification, "--model=p.net", *scripts.data(), *evaluation)
    results = json.loads(Path("runs/test_0/results.json").read_text())
    assert results["treatment"] == "BatchNorm (pretrained) --rln 3"
    net = load_network("p.net")
    assert net.get_buffer("trunk.1.num_batches_tracked").item() == 3  # the buffer was trained and saved
    assert not net.training


def test_arguments_of_the_constructor_are_flags(scripts: Scripts) -> None:
    flags = ["--treatment=BatchNorm", *scripts.data(), "--train_classes=10", "--steps=1", "--update_step=2"]
    scripts(mrcl_classification, *flags, "--dropout=0.5", "--width=4", "--model_name=b.net")
    net = load_network("b.net")
    assert net.widths == {"width": 4, "dropout": 0.5, "num_classes": 20}
    scripts(mrcl_classification, "--treatment=Skipped", *flags[1:], "--no-skip", "--model_name=s.net")
    assert load_network("s.net").widths["skip"] is False
    with pytest.raises(SystemExit):
        scripts(mrcl_classification, *flags, "--dropout=much")


def test_meta_test_leaves_training_mode_and_buffers_alone() -> None:
    net = new("BatchNorm").double().train()
    learner = MetaLearner(
        net, images(10, 4), torch.Generator().manual_seed(0), meta_lr=0.001, update_lr=0.1, rln=0
    )
    learner.step(sample_trajectory([4] * 10, torch.Generator(), update_step=2, remember=3))
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    represent(net, images(2, 3))
    assert net.training
    torch.testing.assert_close(dict(net.named_buffers()), buffers, rtol=0, atol=0)


def changed_anml(change: Callable[[ANML], None]) -> type[Network]:
    """ANML with something done to it in its constructor, as somebody would try things out."""

    class Changed(ANML):
        no_effect = ()

        def __init__(self, num_classes: int = 20) -> None:
            super().__init__(4, 6, num_classes)
            change(self)

    return Changed


def put(name: str, module: nn.Module) -> Callable[[ANML], None]:
    return lambda net: net.set_submodule(name, module)


class Dropped(ConvBlock):
    """Dropout between convolution and norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.dropout(F.conv2d(x, self.conv.weight), 0.3, self.training))
        return F.max_pool2d(F.relu(x), 2)


@pytest.mark.parametrize(
    "change",
    [
        put("pln.block2.conv", nn.Conv2d(6, 6, 3, groups=2)),
        put("pln.block3.conv", nn.Conv2d(6, 6, 3, padding=1, stride=2)),
        put("pln.block2.norm", nn.GroupNorm(2, 6)),
        put("pln.block2", Dropped(6, 6, True)),
        put("nm.sigmoid", nn.Softsign()),
        put("head", nn.Sequential(nn.Tanh(), nn.Linear(54, 20))),
    ],
)
def test_parts_of_anml_changed(change: Callable[[ANML], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is changed is computed, and exact; nothing falls back to the layers of before."""
    kind = changed_anml(change)
    kind.no_effect = ANML.no_effect
    monkeypatch.setitem(NETWORKS, "Changed", kind)
    check_network(
        "Changed", prepare=partial(use_backend, name="fast", device=CPU), meta_loss=meta_loss("fast")
    )
    plain, fast, x = new("Changed"), new("Changed", "fast"), images(3).float()
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    test_meta_gradient_at_every_cut("Changed", "fast", False)


class Stateful(Network):
    """Keeps a running mean of what it has seen, even in eval mode."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.seen = torch.zeros(1)
        self.head = nn.Linear(784, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen.detach() + images.mean()
        logits: Tensor = self.head((images - self.seen).flatten(1))
        return logits


class Batchwise(Network):
    """Centres each batch."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.head = nn.Linear(784, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head((images - images.mean(0)).flatten(1))
        return logits


class Outside(Network):
    """Computes with a random matrix that no state dict holds."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.matrix = torch.randn(784, 10)
        self.head = nn.Linear(10, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1) @ self.matrix.to(images))
        return logits


class Referred(Network):
    """Reaches around the module for a parameter."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.head = nn.Linear(10, num_classes)
        self.alias = [self.layer.weight]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.linear(images.flatten(1), self.alias[0], self.layer.bias))
        return logits


class WrongCut(Network):
    """Its frozen part forgets a layer."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3 * 784, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(images).flatten(1))
        return logits

    def frozen(self, images: Tensor, trained: Any) -> Tensor:
        return images if "layer.weight" in trained else 2 * images


class Unused(Network):
    """Holds a layer that it does not use."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.head = nn.Linear(784, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


class SharedHead(Network):
    """Nothing in its head belongs to one class."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.body = nn.Linear(784, num_classes)
        self.head = nn.PReLU()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.flatten(1)))
        return logits


class OneRow(Network):
    """Gives one row for a whole batch."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.head = nn.Linear(784, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1)).mean(0)
        return logits


class Crashing(Network):
    """Is made for another size of images."""

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.head = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Stateful, "other logits"),
        (Batchwise, "alone than in a batch"),
        (Outside, "neither a parameter nor a buffer"),
        (Referred, "parameters that it is handed"),
        (WrongCut, "--rln 1 the frozen part"),
        (Unused, "layer.bias has no effect"),
        (SharedHead, "row for each class"),
        (OneRow, r"forward gives \[20\]"),
        (Crashing, "fails on 2 images of 28 x 28"),
        (changed_anml(lambda net: None), "conv.bias has no effect"),
    ],
)
def test_what_is_wrong_is_one_line(kind: type[Network], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Wrong", kind)
    with pytest.raises(UserError, match=f"network Wrong.*{says}") as error:
        check_network("Wrong")
    assert "\n" not in str(error.value)


def test_a_network_that_is_wrong_is_not_trained(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Wrong", Batchwise)
    with pytest.raises(UserError, match="alone than in a batch"):
        scripts(mrcl_classification, "--treatment=Wrong", *scripts.data(), "--train_classes=10")
    assert not Path("runs").exists()


def test_check_as_a_command(call: Callable[..., Called]) -> None:
    done = call(check_tool, "sANML")
    assert done.returncode == 0, done.stderr
    assert "3,493,864 parameters in 7 layers, all checks passed" in done.stdout
