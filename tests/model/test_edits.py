"""What is read is what runs: the default backend follows every edit of the working copy."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mrcl_classification
from model import layers, method
from model.check import Use
from model.fast import FAST, network, winograd
from model.guard import difference
from model.method import InnerRule, Params
from model.modelfactory import build
from tests.conftest import ROOT, Call, process

BLOCK = layers.ConvBlock.forward
SMALL = "--dataset=glyphs --nm_channels=4 --pln_channels=6 --threads=1 --train_classes=70 --steps=2"


def test_table_of_edits() -> None:
    """Each edit in a process of its own; see `tests.edits`."""
    done = process(ROOT, sys.executable, "-m", "tests.edits")
    assert done.returncode == 0, done.stdout + done.stderr


def test_through_the_script(call: Call, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an edit the default prints other losses than without it and says why it is plain; `--backend fast`
    is refused with the reason."""
    flags = [*SMALL.split(), "--log_every=1", "--update_step=4", f"--cache_dir={cache}"]
    before = call(mrcl_classification, *flags)

    def nothing(_: Params, inner_lr: float) -> InnerRule:
        return lambda params, grads: params

    monkeypatch.setattr(method, "sgd", nothing)
    done, refused = (call(mrcl_classification, *flags, *more) for more in ([], ["--backend=fast"]))
    reason = "fast gives other numbers than what is written: the inner step"
    assert f"backend plain: {reason}" in done.stdout
    losses = [re.findall(r"^step \d+/2 loss \S+", said.stdout, re.M) for said in (done, before)]
    assert losses[0] != losses[1]
    assert [len(found) for found in losses] == [2, 2]
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"--backend fast: {reason}" in refused.stderr
    assert len([*Path("runs").iterdir()]) == 2, "a refusal leaves nothing"


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose last result, a tensor, is twice as large."""

    def wrong(*args: Any) -> Any:
        *found, last = function(*args)
        return *found, 2 * last

    return wrong


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "channels"),
    [
        # Without frozen layers it serves training on whole batches alone, and no inner step.
        (network._Apply, "backward", staticmethod(doubled(network._Apply.backward)), 1),
        (winograd, "gradients", doubled(winograd.gradients), 1),
        (layers.ConvBlock, "forward", lambda self, x: BLOCK(self, x.mean(1, True).expand_as(x)), 3),
    ],
)
def test_the_guard_sees_what_runs(
    owner: Any, name: str, wrong: Any, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fast backend, or in plain where it reads colours."""
    monkeypatch.setattr(owner, name, wrong)
    net = build("sANML", {"pln_channels": 128, "num_classes": 5}, torch.Generator().manual_seed(0)).train()
    found = difference(net, torch.device("cpu"), Use(update_step=2, channels=channels), FAST)
    assert found is not None
    assert "logits" in found
