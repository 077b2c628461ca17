"""The flags of `pretrain_classification.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flags.common import (
    PLACES,
    DataFlags,
    NetworkFlags,
    ReportFlags,
    RunFlags,
    name_flag,
    resume_flag,
    seed_flag,
    train_classes_flag,
    treatment_flag,
)
from utils.errors import UserError
from utils.flag import Flags, file_path, flag, positive, whole

MAY_CHANGE = frozenset(("log_every", "save_every", "device", "threads", "backend", "model_name", *PLACES))


@dataclass(kw_only=True)
class MethodFlags(Flags):
    """What is trained, and for how long; the default budget is what meta-training sees."""

    group = "method"

    treatment: str = treatment_flag("OML")
    images: int = flag(
        1680000,
        whole(1),
        "images to train on, counted each time they come: 20,000 steps of 84 in meta-training",
    )
    batch_size: int = flag(84, whole(1), "images per step")
    lr: float = flag(0.0001, positive, "learning rate of Adam")
    train_classes: int | None = train_classes_flag("classes to train on")


@dataclass(kw_only=True)
class PretrainingRunFlags(RunFlags):
    """Where the model goes."""

    name: str = name_flag("pretrain")
    seed: int = seed_flag(9)
    model_name: Path = flag(
        Path("Pretrain_Model.net"), file_path, "file for the trained weights", metavar="FILE"
    )
    resume: Path | None = resume_flag(MAY_CHANGE)


@dataclass(kw_only=True)
class Pretraining(MethodFlags, NetworkFlags, DataFlags, ReportFlags, PretrainingRunFlags):
    """Train a network on shuffled images of all meta-training classes.

    python pretrain_classification.py --images 420000
    """

    def changeable(self) -> frozenset[str]:
        return MAY_CHANGE

    def validate(self) -> None:
        outputs, classes = self.constructor.get("num_classes"), self.train_classes
        if outputs is not None and classes is not None and classes > outputs:
            raise UserError(f"--train_classes {classes} must not be larger than --num_classes {outputs}")
