"""Edits of the method, the layers, the networks and the optimizer, each in a process of its own.

    python -m tests.edits [NAME ...]

Of each edit it prints whether the default backend gives the numbers of `--backend plain` up to rounding, and
whether these are others than before the edit. A child process imports the project with one file's text
replaced. Children are forked, so that torch is loaded once.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
METHOD, LAYERS, FACTORY = "model/method.py", "model/layers.py", "model/modelfactory.py"
WIDTHS = {"nm_channels": 4, "pln_channels": 6, "num_classes": 12}


class Edit(NamedTuple):
    """One edit: in `file`, `old` becomes `new`; numbers are those of the network `kind`."""

    name: str
    file: str
    old: str
    new: str
    kind: str = "ANML"


RULE = "p.add(grads[name], alpha=-inner_lr)"
BLOCK = "F.relu(self.norm(self.conv._conv_forward(x, self.conv.weight, None)))"
POOL = "F.max_pool2d(x, 2, return_indices=True)[0]"
ANML_FEATURES = "return self.features_before_gate(inputs) * self.gate(inputs)"
EDITS = (
    Edit("no inner step", METHOD, RULE, "p.add(grads[name], alpha=-0.0 * inner_lr)"),
    Edit("inner step of the sign", METHOD, RULE, "p.add(grads[name].sign(), alpha=-0.01 * inner_lr)"),
    Edit("weight decay in the inner step", METHOD, RULE, "p.mul(0.99).add(grads[name], alpha=-inner_lr)"),
    Edit(
        "inner gradients clipped",
        METHOD,
        RULE,
        "p.add(grads[name].clamp(-0.01, 0.01), alpha=-inner_lr)",
    ),
    Edit("inner step of OML", METHOD, RULE, "p.add(grads[name], alpha=-0.5 * inner_lr)", "OML"),
    Edit("logits scaled", METHOD, "found: Tensor = net(images)", "found: Tensor = net(images) * 0.5"),
    Edit(
        "smoothed inner loss",
        METHOD,
        "F.cross_entropy(forward(params, images), labels)",
        "F.cross_entropy(forward(params, images), labels, label_smoothing=0.1)",
    ),
    Edit(
        "an inner step left out",
        METHOD,
        "        params = rule(params, grads)",
        "        params = rule(params, grads) if t != 3 else params",
    ),
    Edit(
        "second order in the last two steps",
        METHOD,
        "create_graph = t >= inner.constant(len(labels))",
        "create_graph = t >= max(inner.constant(len(labels)), len(labels) - 2)",
    ),
    Edit(
        "the meta-loss of the trajectory alone",
        METHOD,
        "return F.cross_entropy(logits, query[1]), logits",
        "return F.cross_entropy(logits[-2:], query[1][-2:]), logits",
    ),
    Edit(
        "smoothed loss at meta-test",
        METHOD,
        "F.cross_entropy(self.net(image), label)",
        "F.cross_entropy(self.net(image), label, label_smoothing=0.3)",
    ),
    Edit(
        "images learned in reverse",
        METHOD,
        "        for t in range(len(labels)):\n            self.step",
        "        for t in reversed(range(len(labels))):\n            self.step",
    ),
    Edit(
        "images learned at random",
        METHOD,
        "        for t in range(len(labels)):\n            self.step",
        "        for t in torch.randperm(len(labels)).tolist():\n            self.step",
    ),
    Edit(
        "another answer",
        METHOD,
        "return classify(self.net(images))",
        "return (classify(self.net(images)) + 1) % 12",
    ),
    Edit("GELU", LAYERS, BLOCK, BLOCK.replace("relu", "gelu")),
    Edit("ReLU6", LAYERS, BLOCK, BLOCK.replace("relu", "relu6")),
    Edit("leaky ReLU in sANML", LAYERS, BLOCK, BLOCK.replace("relu", "leaky_relu"), "sANML"),
    Edit("ReLU before the norm", LAYERS, BLOCK, "self.norm(F.relu(self.conv(x)))"),
    Edit("average pooling", LAYERS, POOL, "F.avg_pool2d(x, 2)"),
    Edit("no norm", LAYERS, BLOCK, "F.relu(self.conv._conv_forward(x, self.conv.weight, None))"),
    Edit("unbiased variance", LAYERS, "(2, 3), correction=0", "(2, 3), correction=1"),
    Edit("a larger eps", LAYERS, "torch.rsqrt(variance + self.eps)", "torch.rsqrt(variance + 0.1)"),
    Edit("norm without shift", LAYERS, " * scale + self.bias[:, None, None]", " * scale"),
    Edit(
        "absolute scale",
        LAYERS,
        "scale = self.weight[:, None, None]",
        "scale = self.weight.abs()[:, None, None]",
    ),
    Edit(
        "no bias",
        LAYERS,
        "nn.Conv2d(inputs, outputs, kernel_size=3)",
        "nn.Conv2d(inputs, outputs, 3, bias=False)",
    ),
    Edit("a wider eps by default", LAYERS, "eps: float = 1e-5", "eps: float = 1e-2"),
    Edit(
        "no second pool",
        LAYERS,
        "block2=ConvBlock(channels, channels, pool=True)",
        "block2=ConvBlock(channels, channels, pool=False), drop=nn.MaxPool2d(2, 2)",
    ),
    Edit(
        "darker images",
        LAYERS,
        "images.expand(-1, channels, -1, -1) if",
        "images.expand(-1, channels, -1, -1) * 0.5 if",
    ),
    Edit(
        "noise in frozen outputs",
        FACTORY,
        "x, count = stage(x), count + 1",
        "x, count = stage(x) * 1.1, count + 1",
    ),
    Edit(
        "stages scaled",
        LAYERS,
        "    for stage in list(chain)[done:]:\n        x = stage(x)",
        "    for stage in list(chain)[done:]:\n        x = stage(x) * 0.9",
    ),
    Edit(
        "an open gate added",
        FACTORY,
        ANML_FEATURES,
        "return self.features_before_gate(inputs) * (1 + self.gate(inputs))",
    ),
    Edit("features without gate", FACTORY, ANML_FEATURES, "return self.features_before_gate(inputs)"),
    Edit(
        "a gate of tanh", FACTORY, 'add_module("sigmoid", nn.Sigmoid())', 'add_module("sigmoid", nn.Tanh())'
    ),
    Edit(
        "a sharper gate",
        FACTORY,
        "return run_rest(self.nm, inputs, 0)",
        "return run_rest(self.nm, inputs, 0) ** 2",
    ),
    Edit(
        "square features",
        FACTORY,
        "return run_rest(self.pln, inputs, 1)",
        "return run_rest(self.pln, inputs, 1).square()",
    ),
    Edit(
        "a scaled head",
        FACTORY,
        "logits: Tensor = self.head(self.features(inputs))",
        "logits: Tensor = 0.5 * self.head(self.features(inputs))",
    ),
    Edit(
        "dropout",
        FACTORY,
        ANML_FEATURES,
        "x = self.features_before_gate(inputs) * self.gate(inputs)\n"
        "        return nn.functional.dropout(x, 0.5, self.training)",
    ),
    Edit(
        "sANML's features",
        FACTORY,
        "return run_rest(self.pln, inputs, 0)",
        "return run_rest(self.pln, inputs, 0) + 1",
        "sANML",
    ),
    Edit(
        "OML's features",
        FACTORY,
        "return run_rest(self.body, inputs, 0)",
        "return run_rest(self.body, inputs, 0) * 2",
        "OML",
    ),
    Edit("OML's activation", FACTORY, 'f"relu{i + 1}", nn.ReLU()', 'f"relu{i + 1}", nn.ELU()', "OML"),
    Edit("OML's strides", FACTORY, "(1, 1, 1, 2, 1, 2)", "(1, 1, 2, 1, 1, 2)", "OML"),
    Edit(
        "another gain", FACTORY, "math.sqrt(2 / math.prod(shape[1:]))", "math.sqrt(1 / math.prod(shape[1:]))"
    ),
    Edit("no row drawn anew", "model/outer_loops.py", "        if self.reset:", "        if False:"),
    Edit("Adam's rate", "model/optimizer.py", "lr=self.lr,", "lr=3 * self.lr,"),
    Edit("Adam's betas", "model/optimizer.py", "BETAS = (0.9, 0.999)", "BETAS = (0.5, 0.9)"),
)


class _Edited(importlib.machinery.SourceFileLoader):
    """Imports one module of the project from an edited text."""

    def __init__(self, file: str, text: str) -> None:
        name = file.removesuffix(".py").replace("/", ".")
        super().__init__(name, str(ROOT / file))
        self.text = text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = fullname == self.name
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if found else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def numbers(kind: str, asked: str) -> tuple[str, list[float]]:
    """The backend that ran, and what two meta-steps of each order and a meta-test gave on a small network."""
    from datasets import Pool
    from datasets.task_sampler import sample_trajectory
    from model.fast import choose_backend
    from model.guard import Use
    from model.learner import Settings
    from model.meta_test import FrozenOutputs, answers, learn, new_run
    from model.method import InnerLoop
    from model.modelfactory import NETWORKS, build, trained_parameters
    from model.outer_loops import TrajectoryLoop

    logging.getLogger("anml").setLevel(logging.ERROR)
    known = inspect.signature(NETWORKS[kind]).parameters
    widths = {name: value for name, value in WIDTHS.items() if name in known}
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(12, 8, 1, 28, 28, generator=generator) > 0.9).double() * 3 - 0.3
    found: list[float] = []
    used = []
    for first_order in (False, True):
        net = build(kind, widths, generator).double()
        with torch.no_grad():  # at initial values some edits hide: scales are 1, biases 0
            for parameter in net.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        inner = InnerLoop(0.05, 0 if first_order else None)
        use = Use(net, inner=inner, update_step=6)
        backend = choose_backend(asked, [net], torch.device("cpu"), use)
        used.append(backend.name)
        outer = TrajectoryLoop(
            net.train(),
            images,
            generator,
            meta_lr=0.001,
            inner=inner,
            rln=net.rln_training,
            meta_loss=backend.meta_loss,
            capture=backend.capture,
        )
        torch.manual_seed(0)
        for _ in range(2):
            trajectory = sample_trajectory([8] * 12, generator, update_step=6, remember=10)
            step = outer.step(trajectory)
            found += [value.item() for value in step.values()]
        found += [p.detach().double().norm().item() for p in net.parameters()]
    trained = trained_parameters(net, net.default_meta_test_rln)
    net = new_run(net, trained, generator)
    outputs = FrozenOutputs(net, Pool.of(images), trained)
    online = backend.adam_learner(net, trained, Settings(lr=0.01))
    index = torch.cartesian_prod(torch.arange(12), torch.arange(8))
    learn(online, outputs, index)
    found += answers(online, outputs, index).double().tolist()
    found += [p.detach().double().norm().item() for p in net.parameters()]
    return "fast" if used == ["fast", "fast"] else "plain", found


def in_child(edit: Edit | None, kind: str, asked: str) -> tuple[str, list[float]]:
    """`numbers`, computed by a forked process that imports the project with the edit."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if edit is not None:
                text = (ROOT / edit.file).read_text(encoding="utf-8")
                assert text.count(edit.old) >= 1, f"{edit.name}: {edit.file} does not hold {edit.old!r}"
                sys.meta_path.insert(0, _Edited(edit.file, text.replace(edit.old, edit.new)))
            answer = json.dumps(numbers(kind, asked))
        except BaseException as error:
            answer = json.dumps(["failed", [f"{type(error).__name__}: {error}"]])
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        backend, found = json.loads(file.read())
    os.waitpid(child, 0)
    return backend, found


def close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two lists of numbers agree up to the rounding of float64 in a few steps."""
    pairs = list(zip(ours, theirs, strict=False))
    return len(ours) == len(theirs) and all(abs(a - b) <= 1e-7 * max(1, abs(b)) for a, b in pairs)


def main() -> None:
    torch.set_num_threads(1)
    chosen = [edit for edit in EDITS if edit.name in sys.argv[1:] or len(sys.argv) == 1]
    before = {kind: in_child(None, kind, "auto") for kind in {edit.kind for edit in chosen}}
    faults = [
        f"{kind}: unedited, {backend}: {found[:1]}"
        for kind, (backend, found) in before.items()
        if backend != "fast"
    ]
    for edit in chosen:
        backend, found = in_child(edit, edit.kind, "auto")
        _, plain = in_child(edit, edit.kind, "plain")
        if backend == "failed" or not close(found, plain):
            faults.append(
                f"{edit.name}: the default ({backend}) is not what is written: {found[:3]} {plain[:3]}"
            )
        elif found == before[edit.kind][1]:
            faults.append(f"{edit.name}: without effect")
        print(f"{edit.name:36s} {backend}", flush=True)
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
