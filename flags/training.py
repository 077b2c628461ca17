"""The flags of `mrcl_classification.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from flags import common
from model.modelfactory import NETWORKS
from model.treatments import Weights
from utils.errors import UserError
from utils.flag import (
    SEED,
    Heading,
    choice,
    file_path,
    flag,
    folder_name,
    headed,
    number,
    positive,
    switch,
    whole,
)

# How long, how often and where: none of these changes a number.
MAY_CHANGE = frozenset(
    (
        *("steps", "log_every", "save_every", "keep_every", "eval_every", "eval_classes"),
        *("device", "threads", "processes", "backend", "model_name", *common.PLACES),
    )
)


class Training(common.NetworkFlags, common.DataFlags, common.RunFlags):
    """Meta-train ANML or another network and write the initial weights found.

    python mrcl_classification.py --config configs/anml.toml
    """

    no_effect: ClassVar = {
        "seeds": "give one seed with --seed",
        "model": "choose the network with --treatment, weights with --saved_model",
        **common.NO_COMMIT,
    }

    deciding: ClassVar = frozenset({"learner"})

    _method: ClassVar = Heading("method")
    learner: Literal["sgd", "prototypes", "iid"] = choice(
        "sgd",
        ("sgd", "prototypes", "iid"),
        "what the network is to be good for: sgd, a step on each image of a trajectory (the paper); "
        "prototypes, a head of class means; iid, telling the meta-training classes apart, which Pretrain & "
        "Transfer begins with (--treatment is OML then, if not given); each has a group of flags of its own",
    )
    steps: int = flag(
        20000, whole(1), "outer (meta) steps; with prototypes, also the length of the cosine schedule"
    )
    meta_lr: float = flag(
        0.001,
        positive,
        "learning rate of the outer Adam; with prototypes, of its first step",
        shown="0.001, with iid 0.0001",
    )
    train_classes: int | None = flag(
        None, whole(1), "classes to meta-train on, the first of the data", shown="963 of Omniglot, else all"
    )

    _trajectories: ClassVar = Heading("trajectories of --learner sgd")
    rln: int | None = flag(
        None,
        whole(0),
        "layers frozen in the inner loop, counted from the input (7: the whole neuromodulatory "
        "network of ANML; 6: the convolutions of OML); the outer step trains all",
        shown="7 for ANML, 6 for OML, 0 for sANML; `rln_training` of another",
    )
    update_lr: float = flag(0.1, positive, "learning rate of the inner SGD")
    update_step: int = flag(20, whole(1), "inner steps, that is images, per trajectory")
    tasks: int = flag(1, whole(1), "classes per trajectory, sharing the --update_step images")
    meta_batch: int = flag(
        1,
        whole(1),
        "trajectories per outer step, whose meta-gradients are averaged; under torchrun the "
        "processes share them",
    )
    remember: int = flag(64, whole(1), "random images added to the trajectory's in the loss")
    first_order: bool = switch(
        False,
        "take inner gradients as constants, as the released code does, instead of "
        "differentiating through the inner loop",
    )
    second_order_steps: int | None = flag(
        None,
        whole(0),
        "differentiate through this many last inner steps and take the gradients of those before as "
        "constants; 0 is --first_order",
        shown="all",
    )
    learn_update_lr: bool = switch(
        False,
        "learn a step size for every number that the inner loop changes (Meta-SGD), from --update_lr on",
    )
    reset: bool = switch(True, "re-draw the head's rows of the classes of a trajectory before its inner loop")
    reset_copy: bool = switch(
        False,
        "re-draw them in the copy of the weights that the inner loop changes alone, as the paper is said to, "
        "and not for good, as the released code",
    )

    _episodes: ClassVar = Heading("episodes of --learner prototypes")
    ways: int = flag(60, whole(2), "classes of an episode")
    shots: int = flag(3, whole(1), "images of each that its mean is of")
    queries: int = flag(2, whole(1), "images of each that are to be classified")
    leave_one_out: bool = switch(
        False, "classify all the images of an episode, each by its class's mean of the others"
    )
    symmetries: int = flag(
        1,
        int,
        "classes that each class stands for: 1, as it was drawn; 4, turned by quarters as well; 8, mirrored "
        "as well",
        choices=(1, 4, 8),
    )
    augment: float = flag(
        0.0,
        number(0),
        "strength of a random turn, stretch, shear and shift of every other image; 1 for up to 12 degrees, "
        "15 %, 0.15 and 2 pixels",
    )

    _batches: ClassVar = Heading("batches of --learner iid")
    batch_size: int = flag(
        84, whole(1), "images per step; 84 are as many as a step of the paper's meta-training sees"
    )

    _checks: ClassVar = Heading("checks on the way")
    log_every: int = flag(50, whole(1), "steps between lines of the log")
    save_every: int = flag(
        1000,
        whole(1),
        "steps between writes of --model_name and of the training state that --resume goes on from, "
        "which the last step always writes",
    )
    eval_every: int = flag(0, whole(0), "steps between small meta-tests on meta-training classes; 0 for none")
    eval_classes: int = flag(20, whole(1), "classes in each of those meta-tests")

    _run: ClassVar = Heading("run")
    name: str = flag("mrcl_omniglot", folder_name, common.NAME)
    seed: int = flag(9, SEED, common.SEEDED)
    processes: int = flag(1, whole(1), common.PROCESSES, metavar="N")
    keep_every: int = flag(
        0, whole(0), "steps between models that stay in the run folder, as model_<step>.net; 0 for none"
    )
    model_name: Path | None = flag(
        None,
        file_path,
        "file for the trained weights",
        shown="Neuromodulation_Model.net for ANML, NAME_Model.net for another, with iid Pretrain_Model.net",
        metavar="FILE",
    )
    resume: Path | None = flag(
        None,
        file_path,
        "run folder of an interrupted run, to go on from its last training state with its own arguments: on "
        "the CPU with the same --threads, to the same weights bit for bit. Of other flags only these may "
        f"change: {', '.join(f'--{name}' for name in sorted(MAY_CHANGE))}",
        metavar="RUN",
    )
    checkpoint: bool = switch(
        False,
        "start a new run from the weights in --saved_model; its draws follow from --seed and these weights, "
        "so that the same seed does not repeat those that made them",
    )
    saved_model: Path | None = flag(
        None, file_path, "model file to start from, with --checkpoint", metavar="FILE"
    )

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        # Pretrain & Transfer is one of OML's network, which has no norm and needs the smaller rate.
        return {"treatment": "OML", "meta_lr": 0.0001} if given.get("learner") == "iid" else {}

    def changeable(self) -> frozenset[str]:
        # The schedule of episodes is as long as they are many, which makes their numbers.
        return MAY_CHANGE - {"steps"} if self.learner == "prototypes" else MAY_CHANGE

    def idle(self) -> Mapping[str, str]:
        learner = f"--learner {self.learner}"
        others = [head for head in headed(type(self)) if "of --learner" in head and learner not in head]
        of_checks = {} if self.eval_every else {"eval_classes": f"--eval_every {self.eval_every}"}
        return of_checks | {name: learner for head in others for name in headed(type(self))[head]}

    def validate(self) -> None:
        if self.checkpoint and self.saved_model is None:
            raise UserError("--checkpoint needs --saved_model FILE, the weights to start from")
        if self.saved_model is not None and not self.checkpoint:
            raise UserError("--saved_model needs --checkpoint as well to start from those weights")
        if self.reset_copy and not self.reset:
            raise UserError("--reset_copy says where rows are drawn anew: drop it or --no-reset")
        if self.first_order and self.second_order_steps:
            raise UserError(
                "--first_order differentiates through no inner step: drop it or --second_order_steps"
            )


@dataclass(frozen=True)
class Plan:
    """What a meta-training does where its flags leave it open.

    Attributes:
        rln: layers frozen in the inner loop.
        train_classes: classes to train on.
        model_name: file for the trained weights.
        weights: what makes them.
    """

    rln: int
    train_classes: int
    model_name: Path
    weights: Weights

    @classmethod
    def of(cls, args: Training, classes: int) -> Plan:
        """The plan for what is asked, on so many classes."""
        network, iid = NETWORKS[args.treatment], args.learner == "iid"
        name = "Pretrain_Model.net" if iid else network.model_name or f"{args.treatment}_Model.net"
        return cls(
            rln=network.rln_training if args.rln is None else args.rln,
            train_classes=classes,
            model_name=args.model_name or Path(name),
            weights="pretrained" if iid else "meta-trained",
        )
