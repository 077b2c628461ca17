"""The flags of `mrcl_classification.py`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar

from flags import common
from model.method import INNER_RULES, MakeRule, sgd
from model.modelfactory import NETWORKS
from model.outer_loop import OuterLoop
from model.outer_loops import OUTER_LOOPS
from model.treatments import Weights
from utils.distributed import refuse_several
from utils.errors import UserError
from utils.flag import SEED, Heading, Range, Registry, Shown, existing, headed, positive

# How long, how often and where: none of these changes a number.
MAY_CHANGE = frozenset(
    (
        *("steps", "log_every", "save_every", "keep_every", "eval_every", "eval_classes"),
        *("device", "threads", "jobs", "processes", "backend", "model_name", *common.PLACES),
    )
)


class Training(common.DataFlags, common.NetworkFlags, common.RunFlags):
    """Meta-train ANML or another network and write the initial weights found.

    python mrcl_classification.py --config configs/anml.toml
    """

    no_effect: ClassVar = {
        "model": "choose the network with --treatment, weights with --saved_model",
        **common.NO_COMMIT,
    }

    deciding: ClassVar = frozenset({"learn_update_lr"})

    _method: ClassVar = Heading("method")
    learner: Annotated[str, "the outer loop", OUTER_LOOPS] = "sgd"
    steps: Annotated[int, "outer (meta) steps, also the length of the --cosine schedule", Range(1)] = 20000
    meta_lr: Annotated[
        float, "learning rate of the outer Adam", positive, Shown("0.001, with iid 0.0001")
    ] = 0.001
    warm_up: Annotated[
        int, "steps in which the rate rises to --meta_lr, the same part each step", Range(0)
    ] = 0
    cosine: Annotated[
        bool, "let the rate fall to 0 at --steps, as a half cosine (with prototypes and gemcl: on)"
    ] = False
    train_classes: Annotated[
        int | None,
        "classes to meta-train on, the first of the data",
        Range(1),
        Shown("963 of Omniglot, else all"),
    ] = None

    _loop: ClassVar = Heading("outer loop")
    loop: Annotated[
        dict[str, Any],
        Registry("learner", OUTER_LOOPS, "loop", given=len(signature(OuterLoop).parameters)),
    ] = field(default_factory=dict)

    _rule: ClassVar = Heading("inner rule")
    inner_rule: Annotated[str, "what an inner step does with a gradient", INNER_RULES] = "sgd"
    rule: Annotated[dict[str, Any], Registry("inner_rule", INNER_RULES, "rule", given=2)] = field(
        default_factory=dict
    )
    learn_update_lr: Annotated[bool, "the same as --inner_rule meta_sgd"] = False

    _checks: ClassVar = Heading("checks on the way")
    log_every: Annotated[int, "steps between lines of the log", Range(1)] = 50
    save_every: Annotated[int, "steps between writes of the model and the training state", Range(1)] = 1000
    eval_every: Annotated[
        int, "steps between small meta-tests on meta-training classes; 0 for none", Range(0)
    ] = 0
    eval_classes: Annotated[int, "classes in each of those meta-tests", Range(1)] = 20

    _run: ClassVar = Heading("run")
    name: common.Name = "mrcl_omniglot"
    seed: common.Seed = 9
    seeds: Annotated[
        list[int],
        "train a model for each seed, below one folder that --resume and --model of an evaluation take",
        SEED,
        Shown("none"),
    ] = field(default_factory=list)
    jobs: Annotated[
        int | None, "trainings of --seeds at a time, which share the threads", Range(1), Shown("a core each")
    ] = None
    processes: common.Processes = 1
    keep_every: Annotated[
        int, "steps between models that stay in the run folder, as model_<step>.net; 0 for none", Range(0)
    ] = 0
    model_name: Annotated[
        Path | None,
        "file for the trained weights",
        Shown("Neuromodulation_Model.net for ANML, NAME_Model.net for another, with iid Pretrain_Model.net"),
    ] = None
    resume: Annotated[
        Path | None,
        "run folder of an interrupted run, to go on from its last training state with its own arguments: on "
        "the CPU with the same --threads, to the same weights bit for bit. Of other flags only these may "
        f"change: {', '.join(f'--{name}' for name in sorted(MAY_CHANGE))}",
    ] = None
    checkpoint: Annotated[bool, "start a new run, with new draws, from the weights in --saved_model"] = False
    saved_model: Annotated[Path | None, "model file to start from, with --checkpoint", existing] = None

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {**super().implied(given), **OUTER_LOOPS[given.get("learner", "sgd")].defaults}
        return found | ({"inner_rule": "meta_sgd"} if given.get("learn_update_lr") else {})

    @property
    def make_rule(self) -> MakeRule | None:
        """The inner rule with its flags; None for the paper's."""
        entry = INNER_RULES[self.inner_rule]
        return None if entry is sgd else partial(entry, **self.rule)

    def changeable(self) -> frozenset[str]:
        return MAY_CHANGE - {"steps"} if self.cosine else MAY_CHANGE  # the length of the schedule

    def rate(self, done: int) -> float:
        """Adam's step size after `done` steps."""
        rate = self.meta_lr
        if self.cosine:
            rate = rate * (1 + math.cos(math.pi * done / self.steps)) / 2
        return rate * min(1, (done + 1) / self.warm_up) if self.warm_up else rate

    def idle(self) -> Mapping[str, str]:
        has_rule = OUTER_LOOPS[self.learner].inner_loop is not OuterLoop.inner_loop
        of_rule = () if has_rule else headed(type(self))["inner rule"]
        of_seeds = dict.fromkeys(("seed", "model_name", "processes"), "--seeds")
        return {
            **super().idle(),
            **({} if self.eval_every else {"eval_classes": "--eval_every 0"}),
            **({} if self.saved_model is None else {"constructor": "--saved_model"}),
            **(of_seeds if self.seeds else {"jobs": "one --seed"}),
            **dict.fromkeys(of_rule, f"--learner {self.learner}"),
        }

    def validate(self) -> None:
        if self.checkpoint and self.saved_model is None:
            raise UserError("--checkpoint needs --saved_model FILE, the weights to start from")
        if self.saved_model is not None and not self.checkpoint:
            raise UserError("--saved_model needs --checkpoint as well to start from those weights")
        if len({*self.seeds}) < len(self.seeds):
            raise UserError("--seeds names a seed twice")
        if self.learn_update_lr and self.inner_rule != "meta_sgd":
            raise UserError(
                f"--learn_update_lr is --inner_rule meta_sgd: drop it or --inner_rule {self.inner_rule}"
            )
        kind = OUTER_LOOPS[self.learner]
        if self.seeds or not kind.several:
            refuse_several("--seeds" if self.seeds else f"--learner {self.learner}")
        kind.validate(self.loop)


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
    def of(cls, args: Training, classes: int) -> "Plan":
        """The plan for what is asked, on so many classes."""
        network, kind, rln = NETWORKS[args.treatment], OUTER_LOOPS[args.learner], args.loop.get("rln")
        name = kind.model_name or network.model_name or f"{args.treatment}_Model.net"
        return cls(
            rln=network.rln_training if rln is None else rln,
            train_classes=classes,
            model_name=args.model_name or Path(name),
            weights=kind.weights,
        )
