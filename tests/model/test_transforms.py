"""The method under torch.func, and inner rules beside the paper's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from datasets.images import OMNIGLOT, ImageSet, Normalisation, normalise
from flags.training import Training
from model.method import INNER_RULES, InnerLoop, InnerRule, Params, meta_loss
from model.modelfactory import trained_parameters
from tests.conftest import ROOT, Trainer, rows, shown
from tests.model.test_method import images, network
from utils.command_line import parse
from utils.errors import UserError


@pytest.mark.parametrize("steps", [0, None])
@pytest.mark.parametrize(("kind", "rln"), [("ANML", 7), ("OML", 0)])
def test_torch_func(kind: str, rln: int, steps: int | None) -> None:
    """grad, vmap over trajectories, and both: the numbers of backward, one trajectory after the other."""
    net, _ = network(kind)
    params: Params = {name: net.get_parameter(name) for name in trained_parameters(net, rln)}
    detached = {name: p.detach() for name, p in params.items()}
    pixels, labels = images(2, 5), torch.tensor([[0, 5, 3, 3, 4], [0, 5, 3, 3, 5]])

    def loss(params: Params, pixels: Tensor, labels: Tensor) -> Tensor:
        examples = (pixels[-3:], labels[-3:]), (pixels, labels)
        return meta_loss(net, params, *examples, InnerLoop(0.1, steps))[0]

    def grads_of(value: Tensor) -> Params:
        grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(params, grads, strict=True))

    losses = [loss(params, *one) for one in zip(pixels, labels, strict=True)]
    grads = [grads_of(value) for value in losses]
    stacked = {name: torch.stack([one[name] for one in grads]) for name in params}
    together = vmap(loss, in_dims=(None, 0, 0))
    torch.testing.assert_close(grad(loss)(detached, pixels[0], labels[0]), grads[0])
    torch.testing.assert_close(together(detached, pixels, labels), torch.stack(losses).detach())
    torch.testing.assert_close(vmap(grad(loss), in_dims=(None, 0, 0))(detached, pixels, labels), stacked)
    summed = {name: g.sum(0) for name, g in stacked.items()}
    torch.testing.assert_close(grads_of(together(params, pixels, labels).sum()), summed)


@pytest.mark.parametrize(("flags", "says"), [("", "keeps state"), ("--first_order", "the second inner loop")])
def test_a_rule_that_keeps_state_is_refused(
    flags: str, says: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity: Params = {}

    def leaking(initial: Params, inner_lr: float) -> InnerRule:
        """Momentum that lives on from one inner loop to the next."""

        def rule(params: Params, grads: Params) -> Params:
            velocity.update({name: g + 0.9 * velocity.get(name, 0) for name, g in grads.items()})
            return {name: p - 0.01 * velocity[name] for name, p in params.items()}

        return rule

    monkeypatch.setitem(INNER_RULES, "leaking", leaking)
    with pytest.raises(UserError, match=f"^network ANML: the inner rule .*{says}"):
        trainer("--steps=1", "--inner_rule=leaking", *flags.split())
    assert not Path("runs/smoke_0").exists()


def test_rules_by_flag(trainer: Trainer) -> None:
    """A momentum of 0 is the paper's rule, to the digit; a run goes on with its rule."""
    flags = {
        "base": "",
        "none": "--inner_rule=momentum --momentum=0",
        "much": "--inner_rule=Momentum --backend=auto",
    }
    for name, typed in flags.items():
        trainer(f"--name={name}", "--steps=2", *typed.split())
    found = {name: rows(Path(f"runs/{name}_0")) for name in flags}
    assert found["base"] == found["none"] != found["much"]
    config = json.loads(Path("runs/much_0/config.json").read_text())
    assert (config["arguments"]["momentum"], config["backend"]) == (0.9, "plain")
    assert "SGD as inner rule alone" in config["backend_why"]
    trainer.run = Path("runs/much_0")
    trainer.resume("--steps=3")
    assert "--momentum is 0.5 and was 0.9" in trainer.refused("--steps=4", "--momentum=0.5")
    with pytest.raises(UserError, match="--momentum means nothing with --inner_rule sgd: it belongs to"):
        trainer("--momentum=0.5")
    assert parse(Training, ["--learn_update_lr"]).inner_rule == "meta_sgd"
    with pytest.raises(UserError, match="drop it or --inner_rule momentum"):
        trainer("--learn_update_lr", "--inner_rule=momentum")


def test_example_of_the_door_for_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documentation shows, run as it stands there."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(shown("extending.md", "notebook"), names)  # noqa: S102 (our own documentation)
    assert names["logits"].shape == (2, 1000)
    assert names["features"].shape == names["gate"].shape == (2, 2304)


def test_normalise_says_what_it_does_not_take() -> None:
    paper = torch.full((2, 28, 28), 255, dtype=torch.uint8)
    assert normalise(paper.numpy()).shape == (2, 1, 28, 28)
    for turned, usual in ((255 - paper, OMNIGLOT), (paper, Normalisation((20.0,), (60.0,)))):
        with pytest.warns(UserWarning, match="light and dark seem"):
            normalise(turned, usual)
    for wrong in (paper.float(), paper[:, :20], paper[0], paper[:, None, None]):
        for refusing in (normalise, lambda pixels: ImageSet.of("x", {"a": pixels})):
            with pytest.raises(ValueError, match="S, S"):
                refusing(wrong)
