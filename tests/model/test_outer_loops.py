"""Alternating learning, a penalty and the schedule: steps against torch's own, and runs of the script."""

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from datasets.task_sampler import sample_trajectory
from flags.training import Training
from model.fast import BACKENDS
from model.modelfactory import ANML, Network, reset_head, trained_parameters
from model.outer_loop import OuterLoop
from model.outer_loops import OUTER_LOOPS, AlternatingLoop
from tests.conftest import ROOT, Trainer, assert_same_run, pooled, rows
from tests.model.test_method import CLASSES, images, network
from utils.command_line import parse
from utils.errors import UserError
from utils.files import load_checkpoint


@pytest.mark.parametrize(
    ("kind", "rln", "momentum", "reset"),
    [("ANML", 7, 0, True), ("sANML", 0, 0, False), ("sANML", 0, 0.9, True)],
)
def test_alternating_steps_are_those_of_torch(kind: str, rln: int, momentum: float, reset: bool) -> None:
    """Two steps, so that Adam's moments count, by SGD and Adam of torch.optim on a copy."""
    net, pixels = network(kind)[0], images(CLASSES, 20)
    assert rln == net.rln_training
    other, (ours, theirs) = copy.deepcopy(net), (torch.Generator().manual_seed(7) for _ in range(2))
    rule: Any = {0: None, 0.9: parse(Training, ["--inner_rule=momentum"]).make_rule}[momentum]
    flags: dict[str, Any] = {"update_step": 5, "update_lr": 0.01, "reset": reset}
    loop = AlternatingLoop(net, pooled(pixels), ours, meta_lr=0.001, make_rule=rule, **flags)
    adam = torch.optim.Adam(other.parameters(), 0.001)
    for _ in range(2):
        trajectory = sample_trajectory([20] * CLASSES, torch.Generator().manual_seed(1), update_step=5)
        step = loop.step(trajectory)

        if reset:
            reset_head(other, theirs, trajectory.classes)
        learned = [other.get_parameter(name) for name in trained_parameters(other, rln)]
        sgd = torch.optim.SGD(learned, 0.01, momentum=momentum)
        for label, number in trajectory.support.tolist():
            sgd.zero_grad()
            F.cross_entropy(other(pixels[label, number][None]), torch.tensor([label])).backward()
            sgd.step()
        adam.zero_grad()
        labels = trajectory.query[:, 0]
        loss = F.cross_entropy(other(pixels[labels, trajectory.query[:, 1]]), labels)
        loss.backward()
        adam.step()
        torch.testing.assert_close(step["loss"], loss.detach(), rtol=1e-10, atol=0)
    for name, parameter in net.named_parameters():
        if name not in net.no_effect:  # whose gradients are rounding, which Adam scales up
            torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-8, atol=1e-10)


def test_alternating_learning_as_a_run(trainer: Trainer, cache: Path) -> None:
    """Where it diverges, the weights are those before the step."""
    asb = ["--learner=asb", "--update_lr=0.01"]
    trainer(*asb, "--steps=2", "--name=whole")
    again = ["--checkpoint", "--saved_model=runs/whole_0/model.net", "--update_lr=1e30", "--no-reset"]
    with pytest.raises(UserError, match=r"^step 1: .* with --meta_lr 0.001 --update_lr 1e\+30 .* one of"):
        trainer(*asb, *again, "--name=high")
    kept, before = (load_checkpoint(Path(f"runs/{name}_0/model.net")) for name in ("high", "whole"))
    torch.testing.assert_close(kept.state_dict, before.state_dict, rtol=0, atol=0)
    with pytest.raises(UserError, match="--learner asb has no meta-gradient"):
        trainer(*asb, "--inner_rule=meta_sgd")
    for treatment in ("ANML", "sANML"):
        preset = parse(Training, [f"--config={ROOT}/configs/asb.toml", f"--treatment={treatment}"])
        assert (preset.learner, preset.steps, preset.loop["rln"]) == ("asb", 9000, None)


SCHEDULE = ["--no-cosine", "--warm_up=2"]
LOOPS = {"sgd": "--update_step=2", "asb": "--update_step=2", "iid": ""}
LOOPS["prototypes"] = "--ways=5 --symmetries=4 --augment=1"
LOOPS["gemcl"] = "--ways=5 --leave_one_out --gemcl_head=map"


def made(learner: str, net: Network, backend: str = "plain") -> OuterLoop:
    """An outer loop that trains a network on a few classes."""
    flags = parse(Training, [f"--learner={learner}", *LOOPS[learner].split()]).loop
    given = net, pooled(images(CLASSES, 20)), torch.Generator().manual_seed(1)
    return OUTER_LOOPS[learner](*given, meta_lr=0.1, backend=BACKENDS[backend], **flags)


@pytest.mark.parametrize("learner", LOOPS)
def test_a_penalty_counts_once_in_every_loop(learner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, decayed = (made(learner, network("ANML")[0]) for _ in range(2))
    plain.gradient(*plain.draw()[1:])
    monkeypatch.setattr(ANML, "penalty", lambda net: 0.5 * net.head.weight.square().sum())
    measured = decayed.gradient(*decayed.draw()[1:])
    weight = decayed.net.get_parameter("head.weight")
    torch.testing.assert_close(measured["penalty"], 0.5 * weight.detach().square().sum())
    for parameter, ours, theirs in zip(decayed.learned, decayed.grads, plain.grads, strict=True):
        torch.testing.assert_close(ours, theirs + weight.detach() if parameter is weight else theirs)


@pytest.mark.parametrize("learner", LOOPS)
def test_both_backends_give_the_same_gradient(learner: str) -> None:
    found = []
    for backend in BACKENDS:
        loop = made(learner, network("ANML", backend)[0], backend)
        found.append([*loop.gradient(*loop.draw()[1:]).values(), *loop.grads])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_leaves_no_tensor_to_the_garbage_collector(backend: str) -> None:
    """A tensor in a reference cycle lives until the collector runs: a run grew by 100 MB a step."""
    loops = [made(name, network("ANML", backend)[0], backend) for name in LOOPS]
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for loop in loops:
            loop.step(*loop.draw()[1:])
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize(
    ("learner", "more"), [*((name, []) for name in LOOPS), ("sgd", ["--learn_update_lr"])]
)
def test_a_run_checks_itself_and_goes_on_to_the_same_bits(
    learner: str, more: list[str], trainer: Trainer
) -> None:
    """What an inner rule learns is saved with the model."""
    trainer.flags.remove("--update_step=2")
    trainer.flags += [f"--learner={learner}", *LOOPS[learner].split(), "--treatment=ANML", "--no-cosine"]
    trainer.flags += ["--eval_every=2", "--eval_classes=5", *more]
    trainer("--steps=4", "--name=whole")
    trainer("--steps=2", "--name=part")
    trainer.run = Path("runs/part_0")
    assert "step 2 meta-test on 5 meta-training classes: test" in (trainer.run / "log.txt").read_text()
    trainer.resume("--steps=4")
    assert_same_run(Path("runs/whole_0"), trainer.run)
    rules = [load_checkpoint(Path(f"runs/{name}_0/model.net")).inner_rule for name in ("part", "whole")]
    torch.testing.assert_close(*rules, rtol=0, atol=0)
    assert not more or rules[0]["head/weight"].unique().numel() > 1


def test_more_trajectories_than_outputs(trainer: Trainer) -> None:
    """Some are then of the same class."""
    trainer("--steps=1", "--meta_batch=5", "--train_classes=3", "--num_classes=3", "--remember=2")
    assert load_checkpoint(trainer.run / "model.net").step == 1


def test_a_penalty_in_a_run(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that began without goes on with it."""
    trainer("--steps=2", "--name=base", "--meta_batch=2")
    monkeypatch.setattr(ANML, "penalty", lambda net: net.head.weight.square().sum())
    trainer.run = Path("runs/base_0")
    trainer.resume("--steps=4")
    trainer.resume("--steps=5")
    penalties = [row["penalty"] for row in rows(trainer.run)]
    assert (penalties[:2], len(penalties)) == (["", ""], 5)
    assert all(float(penalty) > 1 for penalty in penalties[2:])


def test_the_schedule_is_that_of_all_loops(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = parse(Training, ["--steps", "8", "--meta_lr", "0.1", "--warm_up", "4", "--cosine"])
    expected = [0.1 * min(1, (k + 1) / 4) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]
    assert [flags.rate(k) for k in range(9)] == pytest.approx(expected)
    assert parse(Training, ["--learner=prototypes"]).cosine
    rates: list[float] = []
    plain_update = OuterLoop.update

    def update(loop: OuterLoop) -> None:
        rates.append(loop.optimizer.lr)
        plain_update(loop)

    monkeypatch.setattr(OuterLoop, "update", update)
    trainer.flags.remove("--update_step=2")
    for learner, typed in LOOPS.items():
        rates.clear()
        trainer(f"--learner={learner}", *typed.split(), "--treatment=ANML", "--meta_lr=0.1", *SCHEDULE)
        assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1])
    trainer.run = Path("runs/smoke_0")
    trainer.resume("--steps=5")
    assert rates[-1] == 0.1
    assert "--warm_up is 3 and was 2" in trainer.refused("--warm_up=3")
    trainer("--cosine", "--name=cosine")
    trainer.run = Path("runs/cosine_0")
    assert "--steps is 9 and was 4" in trainer.refused("--steps=9")
