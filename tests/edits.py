"""Edits of the method, the layers, the networks and the optimizer, each in a process of its own.

    python -m tests.edits

Of each edit it prints which backend the default chose. It fails where the default gives other numbers than
`--backend plain`, but for rounding, or the numbers of before the edit. A child process imports the project
with one file's text replaced. Children are forked, so that torch is loaded once, and has done all that it
does once.
"""

import inspect
import logging
import sys
from math import isclose
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from utils.errors import UserError

ROOT = Path(__file__).parents[1]
METHOD, LAYERS, FACTORY = "model/method.py", "model/layers.py", "model/modelfactory.py"
WIDTHS = {"nm_channels": 4, "pln_channels": 6, "num_classes": 12}


class Edit(NamedTuple):
    """One edit: `old`, which a file holds once, becomes `new`; numbers are those of the network `kind`."""

    name: str
    old: str
    new: str
    kind: str = "ANML"


RULE, ONLINE = "p.add(grads[name], alpha=-inner_lr)", "self.net(image), label"
LOSS = "(params, images), labels"
EDITS: dict[str, list[Edit]] = {
    METHOD: [
        Edit("no inner step", RULE, "p.add(grads[name], alpha=-0.0 * inner_lr)"),
        Edit("logits scaled", "found: Tensor = net(images)", "found: Tensor = net(images) * 0.5"),
        Edit("smoothed inner loss", f"{LOSS})", f"{LOSS}, label_smoothing=0.1)"),
        Edit("an inner step left out", "rule(params, grads)", "rule(params, grads) if t != 3 else params"),
        Edit("inner losses scaled", "losses.append(loss.detach())", "losses.append(loss.detach() / 2)"),
        Edit("second order at the end", "t >= inner.constant(", "t >= len(labels) - 2 + 0 * inner.constant("),
        Edit("the meta-loss of a part", "cross_entropy(logits, query", "cross_entropy(0.5 * logits, query"),
        Edit("smoothed loss at meta-test", ONLINE, "self.net(image), label, label_smoothing=0.3"),
        Edit("learned in reverse", "self.step(images[t : t + 1]", "self.step(images[-1 - t :][:1]"),
        Edit("another answer", "classify(self.net(images))", "(classify(self.net(images)) + 1) % 12"),
    ],
    LAYERS: [
        Edit("GELU", "F.relu(", "F.gelu("),
        Edit("ReLU before the norm", "F.relu(self.norm(", "self.norm(F.relu("),
        Edit("average pooling", "F.max_pool2d(x, 2, return_indices=True)[0]", "F.avg_pool2d(x, 2)"),
        Edit("unbiased variance", "(2, 3), correction=0", "(2, 3), correction=1"),
        Edit("norm without shift", " * scale + self.bias[:, None, None]", " * scale"),
        Edit("absolute scale", "scale = self.weight[", "scale = self.weight.abs()["),
        Edit("no bias", "outputs, kernel_size=3)", "outputs, kernel_size=3, bias=False)"),
        Edit("a wider eps by default", "eps: float = 1e-5", "eps: float = 1e-2"),
        Edit(
            "pool as a stage",
            "ConvBlock(inputs, channels, not last or size > 30, number, last)\n",
            "ConvBlock(inputs, channels, False, number, last)\n"
            '        blocks[f"pool{number}"] = nn.Identity() if last else nn.MaxPool2d(2, 2)\n',
        ),
        Edit("another gain", "math.sqrt(2 / math.prod(", "math.sqrt(1 / math.prod("),
        Edit("stages scaled", "        x = stage(x)\n", "        x = stage(x) * 0.9\n"),
    ],
    FACTORY: [
        Edit("darker images", "channels, -1, -1)", "channels, -1, -1) * 0.5"),
        Edit("noise in frozen outputs", "x, count = stage(x),", "x, count = stage(x) * 1.1,"),
        Edit("features without gate", ") * self.gate(inputs)", ")"),
        Edit("a gate of tanh", '"sigmoid", nn.Sigmoid()', '"sigmoid", nn.Tanh()'),
        Edit("square features", "run_rest(self.pln, inputs, 1)", "run_rest(self.pln, inputs, 1).square()"),
        Edit("a scaled head", "self.head(self.features(inputs))", "0.5 * self.head(self.features(inputs))"),
        Edit("sANML's features", "run_rest(getattr", "-run_rest(getattr", "sANML"),
        Edit("OML's features", "run_rest(getattr", "2 * run_rest(getattr", "OML"),
        Edit("OML's activation", 'f"relu{i + 1}", nn.ReLU()', 'f"relu{i + 1}", nn.ELU()', "OML"),
        Edit("OML's strides", "(1, 1, 1, 2, 1, 2)", "(1, 1, 2, 1, 1, 2)", "OML"),
    ],
    "model/outer_loops.py": [Edit("no row drawn anew", "reset_head(self.net, self.generator, c", "str(c")],
    "model/optimizer.py": [
        Edit("Adam's rate", "lr=self.lr,", "lr=3 * self.lr,"),
        Edit("Adam's betas", "BETAS = (0.9, 0.999)", "BETAS = (0.5, 0.9)"),
    ],
}


def numbers(kind: str, asked: str, first_order: bool = False) -> tuple[str, list[float]]:
    """The backends that ran, and what meta-steps and a meta-test gave on a small network.

    Args:
        first_order: whether a meta-step of the first order follows two of the second.
    """
    from datasets.images import Pool
    from datasets.task_sampler import sample_trajectory
    from model.check import Use
    from model.fast import choose_backend
    from model.learner import Given
    from model.meta_test import FrozenOutputs, answers, learn, new_run
    from model.method import InnerLoop
    from model.modelfactory import NETWORKS, build, trained_parameters
    from model.outer_loops import TrajectoryLoop

    logging.getLogger("anml").setLevel(logging.ERROR)
    known = inspect.signature(NETWORKS[kind]).parameters
    widths = {name: value for name, value in WIDTHS.items() if name in known}
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(12, 8, 1, 28, 28, generator=generator) > 0.9).double() * 3 - 0.3
    pool = Pool(images.flatten(0, 1), (8,) * 12)
    found: list[float] = []
    used = []
    for second_order in (True, False)[: 1 + first_order]:
        net = build(kind, widths, generator).double()
        with torch.no_grad():  # at initial values some edits hide: scales are 1, biases 0
            for parameter in net.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        inner = InnerLoop(0.05, None if second_order else 0)
        use = Use(inner=inner, update_step=4)
        backend = choose_backend(asked, [net], torch.device("cpu"), use)
        used.append(backend.name)
        outer = TrajectoryLoop(
            *(net.train(), pool, generator),
            meta_lr=0.001,
            backend=backend,
            update_lr=inner.lr,
            first_order=not second_order,
        )
        torch.manual_seed(0)
        for _ in range(1 + second_order):  # Adam's moments show in a second step
            trajectory = sample_trajectory([8] * 12, generator, update_step=4, remember=6)
            step = outer.step(trajectory)
            found += [value.item() for value in step.values()]
        found += [p.detach().double().norm().item() for p in net.parameters()]
    trained = trained_parameters(net, net.default_meta_test_rln)
    net = new_run(net, trained, generator)
    outputs = FrozenOutputs(net, pool, trained)
    online = backend.adam_learner(net, trained, Given(lr=0.01))
    index = torch.cartesian_prod(torch.arange(12), torch.arange(3))
    learn(online, outputs, index)
    found += answers(online, outputs, index).double().tolist()
    found += [p.detach().double().norm().item() for p in net.parameters()]
    return " and ".join(used), found


def edited(file: str, edit: Edit) -> tuple[str, list[float], list[float]]:
    """The backends that the default chose, its numbers and plain's; no numbers where the edit is refused. The
    process imports the project anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "model"]:
        del sys.modules[name]
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count(edit.old) == 1, f"{edit.name}: {file} does not hold {edit.old!r} once"
    code = compile(text.replace(edit.old, edit.new), str(ROOT / file), "exec", dont_inherit=True)
    name = file.removesuffix(".py").replace("/", ".")
    sys.modules[name] = module = ModuleType(name)
    exec(code, module.__dict__)  # noqa: S102 (our own)
    try:
        used, found = numbers(edit.kind, "auto", file == METHOD)
    except UserError as error:
        return f"refused: {error}", [], []
    return used, found, numbers(edit.kind, "plain", file == METHOD)[1] if "fast" in used else found


def main() -> None:
    torch.set_num_threads(1)
    chosen = [(file, edit) for file, edits in EDITS.items() for edit in edits]
    cases = {(edit.kind, file == METHOD) for file, edit in chosen}
    before = {case: numbers(case[0], "auto", case[1]) for case in cases}
    faults = [f"{case}: unedited, {used}" for case, (used, _) in before.items() if "plain" in used]
    for file, edit in chosen:
        with get_context("fork").Pool(1) as pool:
            used, found, plain = pool.apply(edited, (file, edit))
        # Up to the rounding of float64 in a few steps.
        if not all(isclose(*pair, rel_tol=1e-7, abs_tol=1e-7) for pair in zip(found, plain, strict=True)):
            faults.append(f"{edit.name}: {used} is not what is written: {found[:3]} {plain[:3]}")
        elif found == before[edit.kind, file == METHOD][1]:
            faults.append(f"{edit.name}: without effect")
        print(f"{edit.name:36s} {used}", flush=True)
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
