"""The flags of `pretrain_classification.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flags import common
from flags.common import DataFlags, NetworkFlags
from utils.errors import UserError
from utils.flag import SEED, Flags, file_path, flag, folder_name, positive, whole

MAY_CHANGE = frozenset(
    ("log_every", "save_every", "device", "threads", "backend", "model_name", *common.PLACES)
)


@dataclass(frozen=True, kw_only=True)
class MethodFlags(Flags):
    """What is trained, and for how long; the default budget is what meta-training sees."""

    group = "method"

    treatment: str = common.treatment_flag("OML")
    images: int = flag(
        1680000,
        whole(1),
        "images to train on, counted each time they come: 20,000 steps of 84 in meta-training",
    )
    batch_size: int = flag(84, whole(1), "images per step")
    lr: float = flag(0.0001, positive, "learning rate of Adam")
    train_classes: int | None = flag(
        None, whole(1), "classes to train on, the first of the data", shown="963 of Omniglot, else all"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainingRunFlags(common.RunFlags):
    """Where the model goes."""

    name: str = flag("pretrain", folder_name, common.NAME)
    seed: int = flag(9, SEED, common.SEEDED)
    model_name: Path = flag(
        Path("Pretrain_Model.net"), file_path, "file for the trained weights", metavar="FILE"
    )
    resume: Path | None = flag(
        None, file_path, common.RESUME + ", ".join(f"--{name}" for name in sorted(MAY_CHANGE)), metavar="RUN"
    )


@dataclass(frozen=True, kw_only=True)
class Pretraining(MethodFlags, NetworkFlags, DataFlags, common.ReportFlags, PretrainingRunFlags):
    """Train a network on shuffled images of all meta-training classes.

    python pretrain_classification.py --images 420000
    """

    def changeable(self) -> frozenset[str]:
        return MAY_CHANGE

    def validate(self) -> None:
        outputs, classes = self.constructor.get("num_classes"), self.train_classes
        if outputs is not None and classes is not None and classes > outputs:
            raise UserError(f"--train_classes {classes} must not be larger than --num_classes {outputs}")
