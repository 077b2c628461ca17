"""Measurements of a network while it is meta-trained; they change neither the network nor a draw of
training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from datasets.images import Pool
from evaluation.plots import figure_pixels, gate_figure
from model.learner import Settings
from model.meta_learner import active_fraction
from model.meta_test import LEARNERS, MetaTest
from model.modelfactory import Network
from model.representation import represent
from model.scores import ACCURACY, accuracies
from utils.run import Run

log = logging.getLogger("anml")

LR = 0.001  # of the small meta-tests: the best rate for most class counts
SHOWN = 10  # classes whose gates are drawn, two images each


def validate(run: Run, net: Network, images: Pool, step: int, classes: int, learner: str) -> None:
    """Log a small meta-test on meta-training classes of two or more images, and a picture of gates.

    Of the 20 images of a class 15 are learned and 5 tested; of fewer images, the same share. The picture
    shows the gates of two images of each of the first `SHOWN` classes.

    Args:
        learner: key of `model.meta_test.LEARNERS`.
    """
    kind = LEARNERS[learner]
    options: dict[str, Any] = dict(kind.options or {})
    smallest = min(20, *images.sizes)
    test_images = max(1, smallest // 4)
    test = MetaTest(
        net,
        images,
        net.default_meta_test_rln,
        seed=0,
        train_images=smallest - test_images,
        test_images=test_images,
        learner=kind.make,
        settings=Settings(**options),
        own_head=kind.takes_steps,
    )
    score = test.score(classes, LR, "validation", draw=0)
    found = {name: score[name] for name in accuracies()}
    run.scalars(step, {f"meta_val/{ACCURACY.tag.format(name)}": value for name, value in found.items()})
    text = " ".join(f"{name} {value:.3f}" for name, value in found.items())
    text = "diverged" if score["diverged"] else text
    log.info("step %d meta-test on %d meta-training classes: %s", step, classes, text)
    shown = torch.stack([images[label][:2] for label in range(min(classes, SHOWN))])
    gate = represent(net, shown).gate
    if gate is not None:
        labels = torch.arange(len(shown)).repeat_interleave(2).tolist()
        run.image("meta_val/gate", figure_pixels(gate_figure(gate.rows.cpu().numpy(), labels)), step)


def gate_statistics(net: Network, images: Tensor) -> dict[str, float]:
    """Mean of the gate, and fraction of features that are active before and after it, on images [B, C, 28,
    28]; in a network without a gate the fraction of active features alone."""
    seen = represent(net, images[None])
    if seen.gate is None:
        return {"meta_train/active": active_fraction(seen.before.rows)}
    return {
        "meta_train/gate_mean": seen.gate.rows.mean().item(),
        "meta_train/active_before_gate": active_fraction(seen.before.rows),
        "meta_train/active_after_gate": active_fraction(seen.after.rows),
    }
