"""The flags of `evaluate_classification.py`."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from flags import common
from model.learner import LEARNERS
from model.treatments import TABLE
from utils.command_line import as_typed
from utils.errors import UserError
from utils.flag import Heading, Range, Registry, Shown, existing, headed, positive, word

# The published grid, and four rates more at its upper end, where replications find the best one.
LEARNING_RATES = (
    *(0.003, 0.002, 0.0015, 0.001, 0.00085, 0.0006, 0.0004, 0.00035, 0.0003, 0.00025),
    *(0.0002, 0.00015, 0.0001, 0.00009, 0.00008, 0.00006, 0.00003, 0.00001),
)

SCHEDULE = (10, 50, 75, 100, 200, 300, 400, 500, 600)


class Evaluation(common.SplitFlags, common.DataFlags, common.NetworkFlags, common.RunFlags):
    """Meta-test a model: learn unseen classes one after another, then measure accuracy.

    python evaluate_classification.py --model Neuromodulation_Model.net --nested
    """

    no_effect: ClassVar = {
        "memory": "no image is kept or replayed at meta-test",
        "neuromodulation": "the model file says which network it is",
        **common.NO_COMMIT,
    }

    _method: ClassVar = Heading("method")
    model: Annotated[
        list[Path] | None,
        "model file that mrcl_classification.py wrote, or the folder of --seeds for all its models; of "
        "several, each is tested on draws of its own, and all of them are one row of the results",
        existing,
        Shown("none: give it, or --scratch"),
    ] = None
    scratch: Annotated[bool, "random weights, in the network of --model or else of the network flags"] = False

    _learner: ClassVar = Heading("learner")
    learner: Annotated[str, "what learns the stream", LEARNERS] = "adam"
    of_learner: Annotated[dict[str, Any], Registry("learner", LEARNERS, "learner")] = field(
        default_factory=dict
    )

    _steps: ClassVar = Heading("gradient steps")
    treatment_preset: Annotated[
        str | None,
        f"treatment of the paper, which sets --rln, --scratch, --iid and --epoch: {', '.join(TABLE)}",
        word(TABLE),
    ] = None
    rln: Annotated[
        int | None,
        "layers frozen, counted from the input: ANML 13 trains the head alone, 7 the PLN, 6 the "
        "PLN and the gate's layer, 0 everything; OML 6 trains both linear layers, 7 the last",
        Range(0),
        Shown("the head alone (ANML 13, sANML 6), 6 for OML, 0 with --scratch"),
    ] = None
    freeze: Annotated[bool, "freeze layers; --no-freeze is the same as --rln 0"] = True
    reset: Annotated[bool, "re-draw every trained layer before learning, not the head alone"] = False
    iid: Annotated[bool, "shuffle the stream of images (the Oracle) instead of class after class"] = False
    epoch: Annotated[int, "passes over the stream of images", Range(1)] = 1

    _search: ClassVar = Heading("learning rate")
    lr: Annotated[float | None, "learning rate; skips the search", positive, Shown("search")] = None
    lrs: Annotated[list[float], "learning rates to search", positive] = field(
        default_factory=lambda: list(LEARNING_RATES)
    )
    lr_search_runs: Annotated[
        int,
        "class draws of each model on which the rates are tried; the rate that wins most of them is used, of "
        "several the one with the best mean, then the smallest",
        Range(1),
    ] = 10
    lr_search_split: Annotated[
        Literal["evaluation", "background"],
        "classes to search on: those reported on, or those of the meta-training",
    ] = "evaluation"
    full_search: Annotated[bool, "try every rate on every draw, whether or not it can still win"] = False
    test: Annotated[bool, "choose the rate by meta-test test accuracy, and not by train accuracy"] = False

    _evaluation: ClassVar = Heading("evaluation")
    schedule: Annotated[
        list[int],
        "class counts to learn, each a curve's point; a head that learns by steps has as many outputs as "
        "the largest, or its own, which stand for the classes of a draw in order where the data has more",
        Range(1),
        Shown(f"{' '.join(map(str, SCHEDULE))}; of fewer classes those that fit, and all"),
    ] = field(default_factory=list)
    runs: Annotated[int, "class draws per class count", Range(1)] = 10
    nested: Annotated[
        bool,
        "serve all class counts of --schedule with one pass over each draw, which tests on its way: a "
        "quarter of the work, and points of a curve that are not independent of each other",
    ] = False
    class_order: Annotated[
        Literal["random", "dataset"], "order of the classes: drawn for each run, or that of the data"
    ] = "random"
    track_every: Annotated[
        int,
        "classes between measurements, while the first run of each class count is under way, of the "
        "accuracy on every class learned so far; 0 for none",
        Range(0),
    ] = 0

    _run: ClassVar = Heading("run")
    name: common.Name = "Omni_test_traj"
    seed: common.Seed = 222
    processes: common.Processes = 1
    resume: Annotated[
        Path | None,
        "run folder of an interrupted evaluation to go on with; --runs and --schedule may ask for more",
    ] = None

    def changeable(self) -> frozenset[str]:
        # None of these changes a number: more runs or class counts add to what there is. Models are compared
        # by content, and what the last ones decide by the evaluation's plan.
        changeable = ("model", "runs", "schedule", "full_search", "device", "threads", "processes", "backend")
        of_learner = [flag for flag, (field, _) in self.places.items() if field == "of_learner"]
        return frozenset((*changeable, *common.PLACES, "rln", "test_classes", *of_learner))

    def idle(self) -> Mapping[str, str]:
        parts = headed(type(self))
        of_steps = {*parts["gradient steps"], *parts["learning rate"]}
        others = set() if LEARNERS[self.learner].takes_steps else of_steps
        of_scratch = parts["network"] if self.model else ()
        of_search = {*parts["learning rate"]} - {"lr"} if self.lr is not None else ()
        return {
            **super().idle(),
            **dict.fromkeys(of_scratch, "--model"),
            **dict.fromkeys(of_search, "--lr"),
            **dict.fromkeys(others, f"--learner {self.learner}"),
        }

    def validate(self) -> None:
        if self.model is None and not self.scratch:
            raise UserError("give --model FILE, which mrcl_classification.py writes, or --scratch")
        if self.scratch and len(self.model or ()) > 1:
            raise UserError("--scratch takes the network of one --model, not of several")
        for name, values in (("schedule", self.schedule), ("lrs", self.lrs)):
            if len({*values}) < len(values):
                raise UserError(f"--{name} names a value twice")
        shuffled_or_repeated = self.iid or self.epoch > 1
        if self.track_every and shuffled_or_repeated:
            raise UserError(
                "--track_every follows classes learned one after another, once: drop --iid and --epoch"
            )
        if self.nested and (shuffled_or_repeated or self.class_order != "random"):
            raise UserError(
                "--nested tests on its way through classes learned one after another, once, in random order: "
                "drop --iid, --epoch and --class_order"
            )

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {name: given[name] for name in ("rln", "scratch", "iid", "epoch") if name in given}
        means: dict[str, dict[str, Any]] = {}
        if not given.get("freeze", True):
            means["--no-freeze"] = {"rln": 0}
        if preset := given.get("treatment_preset"):
            row = TABLE[preset]
            if given.get("reset") and not row.scratch:
                raise UserError(f"--treatment-preset {preset} keeps the weights it starts from: drop --reset")
            # The paper gives Oracles of 1 and of 20 passes: their number is the user's.
            epochs = found.get("epoch", 1) if row.iid else 1
            meant = {"rln": row.rln, "scratch": row.scratch, "iid": row.iid, "epoch": epochs}
            means[f"--treatment-preset {preset}"] = meant
        for source, values in means.items():
            for name, value in values.items():
                typed = found.setdefault(name, value)
                if typed != value:
                    said = f"{as_typed(name, value)}, not {as_typed(name, typed)}"
                    raise UserError(f"{source} means {said}: drop one of them")
        return {**super().implied(given), **found}
