"""The flags of the scripts, on the command line and in a config file.

Every flag of the released commands is here under its released spelling. `-` and `_` may stand for
each other in a flag's name. A config file (TOML) holds flags under their destination's name
(`--dataset-path` is `dataset_path`, `--no-reset` is `reset = false`) and passes through the same
parser as the command line, ahead of it: so both have the same ranges, and what is typed wins. So do
the arguments of a run that is resumed; there, what is typed must not change its numbers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from datasets import DATASETS, Source
from datasets.options import loader_options
from model.fast import BACKENDS
from model.learner import VIEWS
from model.meta_test import LEARNERS
from model.modelfactory import NETWORKS, constructor_arguments
from model.optimizer import OPTIMIZERS
from model.treatments import TABLE
from utils.errors import UserError
from utils.files import expand, place_of, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# SPEC's grid, and four rates more at its upper end, where replications find the best one.
LEARNING_RATES = (
    *(0.003, 0.002, 0.0015, 0.001, 0.00085, 0.0006, 0.0004, 0.00035, 0.0003, 0.00025),
    *(0.0002, 0.00015, 0.0001, 0.00009, 0.00008, 0.00006, 0.00003, 0.00001),
)
SCHEDULE = (10, 50, 75, 100, 200, 300, 400, 500, 600)
ALIASES = {"neuromodulation": "ANML"}  # the released code's name
OF_STEPS: dict[str, Any] = {
    **dict.fromkeys(("lr", "treatment_preset", "rln", "iid", "epoch")),
    "freeze": True,
    "reset": False,
    "optimizer": "adam",
    "test": False,
    "lrs": list(LEARNING_RATES),
    "lr_search_runs": 10,
    "lr_search_split": "evaluation",
}
"""Flags that only a learner which takes steps has, and their defaults (None: what others say)."""
OF_HEADS = ("features", "power", "shrinkage")  # flags that only the others have; defaults are those of each
LEARNER_FLAGS: dict[str, dict[str, Any]] = {
    "sgd": {
        "rln": None,
        "update_lr": 0.1,
        "update_step": 20,
        "tasks": 1,
        "meta_batch": 1,
        "remember": 64,
        "first_order": False,
        "second_order_steps": None,
        "learn_update_lr": False,
        "reset": True,
    },
    "prototypes": {
        "ways": 60,
        "shots": 3,
        "queries": 2,
        "leave_one_out": False,
        "symmetries": 1,
        "augment": 0.0,
        "average": 0.0,
    },
}
"""The learners of meta-training, with the flags that they alone have and the defaults of these."""
PLACES = ("dataset_path", "cache_dir", "runs_dir", "name")  # of a run, which may be moved and renamed


class Parser(argparse.ArgumentParser):
    """An argument parser that knows its flags by destination and reports errors in one line."""

    def __init__(self, description: str, check: Callable[[Parser, argparse.Namespace], None]):
        super().__init__(description=description, allow_abbrev=False, exit_on_error=False)
        self.flags: dict[str, argparse.Action] = {}
        self.check = check
        self.may_change: frozenset[str] = frozenset()  # flags that `--resume` takes other values of
        self._spellings: dict[str, str] = {}
        self.set_defaults(notices=(), config=None)

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2 and one line on stderr, without the usage."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def flag(
        self,
        group: argparse._ArgumentGroup,
        name: str,
        kind: Callable[[str], object],
        default: object,
        text: str,
        *,
        shown: str = "%(default)s",
        **options: Any,
    ) -> None:
        """Add a flag with a value; `shown` is the default as the help gives it."""
        text = f"{text} (default: {shown})"
        try:
            action = group.add_argument(name, type=kind, default=default, help=text, **options)
        except argparse.ArgumentError as error:  # of a network or data set of the user's
            self.error(f"two arguments of networks and data sets are called {name}: {error.message}")
        self._register(action, config=True)

    def switch(self, group: argparse._ArgumentGroup, name: str, text: str, *, default: bool = False) -> None:
        """Add the pair `--name` and `--no-name`."""
        action = group.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
        action.help = f"{text} (default: {'on' if default else 'off'})"
        self._register(action, config=True)

    def without_effect(self, group: argparse._ArgumentGroup, name: str, instead: str) -> None:
        """Accept a released flag, with or without values, and tell the user what to do instead."""
        action = group.add_argument(
            name,
            action=_WithoutEffect,
            nargs="*",
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"no effect: {instead}",
        )
        self._register(action, config=False)

    def _register(self, action: argparse.Action, config: bool) -> None:
        if config:
            self.flags[action.dest] = action
        self._spellings |= {_plain(option): option for option in action.option_strings}

    def canonical(self, token: str) -> str:
        """The token with its flag, if it is one, in the registered spelling."""
        name, equals, value = token.partition("=")
        return self._spellings.get(_plain(name), name) + equals + value

    def read(self, tokens: list[str]) -> argparse.Namespace:
        """Parse canonical tokens; a wrong one ends the process as :meth:`error` does."""
        try:
            return self.parse_args(tokens)
        except argparse.ArgumentError as error:
            self.error(str(error))


def parse(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (`argv`, default that of the process) and the config file it names.

    The namespace's `notices` are lines for the user about flags typed without effect. Anything
    wrong ends the process with exit code 2 and one line on stderr.

    With `--resume`, arguments are those of the run, and what is given must agree with them but for
    the flags of `parser.may_change`.
    """
    tokens = [parser.canonical(token) for token in (sys.argv[1:] if argv is None else argv)]
    arguments = parser.read(tokens)
    config, resume = arguments.config, getattr(arguments, "resume", None)
    if config is not None:
        tokens = [*_config_tokens(parser, config), *tokens]
    if resume is not None:
        settings = _settings_of_run(parser, resume)
        earlier_config = settings.pop("config", None)
        config = config or earlier_config
        before = _tokens(parser, settings, resume / "config.json")
        _refuse_contradictions(parser, resume, before, tokens)
        tokens = [*before, *tokens]
    arguments = parser.read(tokens)
    arguments.config = config
    parser.check(parser, arguments)
    return arguments


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a run folder.

    Raises:
        UserError: there is none, or it is not one that a run writes.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder} is not a run folder: cannot read its config.json: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise UserError(f"{path} is damaged: it holds no arguments")
    return config


def _settings_of_run(parser: Parser, folder: Path) -> dict[str, Any]:
    """The arguments that a run folder records, but for flags that had no value."""
    try:
        config = read_config(folder)
    except UserError as error:
        parser.error(f"--resume: {error}")
    settings = {key: value for key, value in config["arguments"].items() if value is not None}
    here, cwd = place_of(folder), config.get("cwd")
    # Where the run is still in its place, so is what it named from where it was started. A folder that
    # was moved knows no better than the user, who moved it.
    if here and config.get("folder") == here["folder"] and isinstance(cwd, str) and cwd != here["cwd"]:
        for key, value in settings.items():
            if key in parser.flags and parser.flags[key].type is _path:
                several = isinstance(value, list)
                paths = [str(Path(cwd, str(path))) for path in (value if several else [value])]
                settings[key] = paths if several else paths[0]
    return settings


def _refuse_contradictions(parser: Parser, folder: Path, before: list[str], tokens: list[str]) -> None:
    """End the process if `tokens` ask for another run than that of the tokens `before`."""
    of_run = parser.read(before)
    given = parser.parse_args(
        tokens, argparse.Namespace(notices=(), **dict.fromkeys(parser.flags, _NOT_GIVEN))
    )
    # Of episodes it is also the length of the schedule, which makes their numbers.
    fixed = ("steps",) if getattr(of_run, "learner", None) == "prototypes" else ()
    contradictions = [
        f"{parser.flags[key].option_strings[0]} is {value} and was {getattr(of_run, key)}"
        for key, value in vars(given).items()
        if key in parser.flags and (key not in parser.may_change or key in fixed)
        if value is not _NOT_GIVEN and value != getattr(of_run, key)
    ]
    if contradictions:
        parser.error(
            f"--resume {folder} goes on as it began: {'; '.join(contradictions)}; drop these flags, or "
            "start a new run without --resume"
        )
    _refuse_lost_places(parser, folder, of_run, given)


def _refuse_lost_places(
    parser: Parser, folder: Path, of_run: argparse.Namespace, given: argparse.Namespace
) -> None:
    """End the process if a model that the run reads, or the folder of the one it writes, is gone."""
    places = [("model", path, path) for path in getattr(of_run, "model", None) or ()]
    written = getattr(of_run, "model_name", None)
    if written is not None:
        places.append(("model_name", written, written.parent))
    for key, path, place in places:
        if getattr(given, key) is _NOT_GIVEN and not os.access(place, os.F_OK):
            parser.error(
                f"--resume {folder}: its --{key} is {path}, and there is no {place} (any more); give "
                f"--{key} FILE as it is today"
            )


_NOT_GIVEN = object()


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain values (JSON, and loadable with `weights_only=True`), to be stored."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    left_out = ("notices", "resume")
    return {key: plain(value) for key, value in sorted(vars(arguments).items()) if key not in left_out}


def network_widths(arguments: argparse.Namespace) -> dict[str, Any]:
    """The network flags as keyword arguments of the class of `--treatment`."""
    names = constructor_arguments(NETWORKS[arguments.treatment])
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def training_parser() -> Parser:
    """The flags of `mrcl_classification.py`; defaults are those of the released train command."""
    parser = Parser(
        "Meta-train ANML or another network and write the initial weights found.", _check_training
    )
    # How long, how often and where: none of these changes a number.
    parser.may_change = frozenset(
        (
            *("steps", "log_every", "save_every", "keep_every", "eval_every", "eval_classes"),
            *("device", "threads", "processes", "backend", "model_name", *PLACES),
        )
    )

    method = parser.add_argument_group("method")
    _treatment(parser, method, "ANML")
    parser.flag(
        method,
        "--learner",
        str.lower,
        "sgd",
        "what the network is to be good for: sgd, a step on each image of a trajectory (the paper), or "
        "prototypes, a head of class means (the flags of the group below in place of those of trajectories)",
        choices=tuple(LEARNER_FLAGS),
    )
    parser.flag(
        method,
        "--rln",
        _whole(0),
        None,
        "layers frozen in the inner loop, counted from the input (7: the whole neuromodulatory "
        "network of ANML; 6: the convolutions of OML); the outer step trains all",
        shown=", ".join(f"{kind.rln_training} for {name}" for name, kind in NETWORKS.items()),
    )
    parser.flag(
        method,
        "--steps",
        _whole(1),
        20000,
        "outer (meta) steps; with prototypes, also the length of the cosine schedule",
    )
    parser.flag(
        method,
        "--meta_lr",
        _positive,
        0.001,
        "learning rate of the outer Adam; with prototypes, of its first step",
    )
    parser.flag(method, "--update_lr", _positive, 0.1, "learning rate of the inner SGD")
    parser.flag(method, "--update_step", _whole(1), 20, "inner steps, that is images, per trajectory")
    parser.flag(method, "--tasks", _whole(1), 1, "classes per trajectory, sharing the --update_step images")
    parser.flag(
        method,
        "--meta_batch",
        _whole(1),
        1,
        "trajectories per outer step, whose meta-gradients are averaged; under torchrun the "
        "processes share them",
    )
    parser.flag(method, "--remember", _whole(1), 64, "random images added to the trajectory's in the loss")
    _train_classes(parser, method, "classes to meta-train on")
    parser.switch(
        method,
        "--first_order",
        "take inner gradients as constants, as the released code does, instead of "
        "differentiating through the inner loop",
    )
    parser.flag(
        method,
        "--second_order_steps",
        _whole(0),
        None,
        "differentiate through this many last inner steps and take the gradients of those before as "
        "constants; 0 is --first_order",
        shown="all",
    )
    parser.switch(
        method,
        "--learn_update_lr",
        "learn a step size for every number that the inner loop changes (Meta-SGD), from --update_lr on",
    )
    parser.switch(
        method,
        "--reset",
        "re-draw the head's rows of the classes of a trajectory before its inner loop",
        default=True,
    )

    prototypes = parser.add_argument_group("episodes of --learner prototypes")
    parser.flag(prototypes, "--ways", _whole(2), 60, "classes of an episode")
    parser.flag(prototypes, "--shots", _whole(1), 3, "images of each that its mean is of")
    parser.flag(prototypes, "--queries", _whole(1), 2, "images of each that are to be classified")
    parser.switch(
        prototypes,
        "--leave_one_out",
        "classify all the images of an episode, each by its class's mean of the others",
    )
    parser.flag(
        prototypes,
        "--symmetries",
        int,
        1,
        "classes that each class stands for: 1, as it was drawn; 4, turned by quarters as well; 8, mirrored "
        "as well",
        choices=(1, 4, 8),
    )
    parser.flag(
        prototypes,
        "--augment",
        _number_from_0,
        0.0,
        "strength of a random turn, stretch, shear and shift of every other image; 1 for up to 12 degrees, "
        "15 %%, 0.15 and 2 pixels",
    )
    parser.flag(
        prototypes,
        "--average",
        _fraction,
        0.0,
        "decay of the moving average of the weights that is checked and written as the model; 0 for the "
        "weights themselves",
    )
    # None tells a flag that was not given from one that was.
    for flags in LEARNER_FLAGS.values():
        for name in flags:
            action = parser.flags[name]
            action.help = (action.help or "").replace("%(default)s", str(flags[name]))
        parser.set_defaults(**dict.fromkeys(flags))

    network = parser.add_argument_group("network")
    _widths(parser, network)

    _data(parser)

    checks = parser.add_argument_group("checks on the way")
    parser.flag(
        checks,
        "--eval_every",
        _whole(0),
        0,
        "steps between small meta-tests on meta-training classes; 0 for none",
    )
    parser.flag(checks, "--eval_classes", _whole(1), 20, "classes in each of those meta-tests")
    _reports(parser, checks)

    run = _run(parser, name="mrcl_omniglot", seed=9)
    _processes(parser, run, "the trajectories of --meta_batch")
    parser.flag(
        run,
        "--keep_every",
        _whole(0),
        0,
        "steps between models that stay in the run folder, as model_<step>.net; 0 for none",
    )
    parser.flag(
        run,
        "--model_name",
        _path,
        None,
        "file for the trained weights",
        shown=", ".join(f"{_model_name(name)} for {name}" for name in NETWORKS),
        metavar="FILE",
    )
    _resume(parser, run)
    parser.switch(
        run,
        "--checkpoint",
        "start a new run from the weights in --saved_model; its draws follow from --seed and these weights, "
        "so that the same seed does not repeat those that made them",
    )
    parser.flag(
        run,
        "--saved_model",
        _path,
        None,
        "model file to start from, with --checkpoint",
        shown="none",
        metavar="FILE",
    )

    released = parser.add_argument_group("flags of the released code, accepted without effect")
    parser.without_effect(released, "--seeds", "give one seed with --seed")
    parser.without_effect(
        released, "--model", "choose the network with --treatment, weights with --saved_model"
    )
    _commit(parser, released)
    return parser


def pretraining_parser() -> Parser:
    """The flags of `pretrain_classification.py`; the default budget is what meta-training sees."""
    parser = Parser("Train a network on shuffled images of all meta-training classes.", _check_pretraining)
    parser.may_change = frozenset(
        ("log_every", "save_every", "device", "threads", "backend", "model_name", *PLACES)
    )

    method = parser.add_argument_group("method")
    _treatment(parser, method, "OML")
    parser.flag(
        method,
        "--images",
        _whole(1),
        1680000,
        "images to train on, counted each time they come: 20,000 steps of 84 in meta-training",
    )
    parser.flag(method, "--batch_size", _whole(1), 84, "images per step")
    parser.flag(method, "--lr", _positive, 0.0001, "learning rate of Adam")
    _train_classes(parser, method, "classes to train on")

    network = parser.add_argument_group("network")
    _widths(parser, network)

    _data(parser)

    checks = parser.add_argument_group("checks on the way")
    _reports(parser, checks)

    run = _run(parser, name="pretrain", seed=9)
    default = "Pretrain_Model.net"
    parser.flag(run, "--model_name", _path, Path(default), "file for the trained weights", metavar="FILE")
    _resume(parser, run)
    return parser


def evaluation_parser() -> Parser:
    """The flags of `evaluate_classification.py`; defaults are the paper's main treatment."""
    parser = Parser(
        "Meta-test a model: learn unseen classes one after another, then measure accuracy.",
        _check_evaluation,
    )
    # None of these changes a number: more runs or class counts add to what there is, and models are
    # compared by content.
    parser.may_change = frozenset(
        ("model", "runs", "schedule", "full_search", "device", "threads", "processes", "backend", *PLACES)
    )

    method = parser.add_argument_group("method")
    parser.flag(
        method,
        "--model",
        _path,
        None,
        "model file that mrcl_classification.py or pretrain_classification.py wrote; of several, "
        "each is tested on draws of its own, and all of them are one row of the results",
        shown="none: give it, or --scratch",
        nargs="+",
        metavar="FILE",
    )
    parser.flag(
        method,
        "--treatment-preset",
        _known_preset,
        None,
        f"treatment of the paper, which sets --rln, --scratch, --iid and --epoch: {', '.join(TABLE)}",
        shown="none",
        metavar="NAME",
    )
    parser.switch(
        method,
        "--scratch",
        "random initial weights; the network is that of --model if given, else that of the "
        "network flags below",
    )
    parser.flag(
        method,
        "--rln",
        _whole(0),
        None,
        "layers frozen, counted from the input: ANML 13 trains the head alone, 7 the PLN, 6 the "
        "PLN and the gate's layer, 0 everything; OML 6 trains both linear layers, 7 the last",
        shown="the head alone (ANML 13, sANML 6), 6 for OML, 0 with --scratch",
    )
    parser.switch(method, "--freeze", "freeze layers; --no-freeze is the same as --rln 0", default=True)
    parser.switch(method, "--reset", "re-draw every trained layer before learning, not the head alone")
    parser.switch(method, "--iid", "shuffle the stream of images (the Oracle) instead of class after class")
    parser.flag(method, "--epoch", _whole(1), None, "passes over the stream of images", shown="1")

    parser.flag(
        method,
        "--learner",
        str.lower,
        "adam",
        "what learns the stream: adam takes one step of --optimizer on each image; heads that need no "
        "gradient sum features up: "
        + ", ".join(f"{name} ({kind.title})" for name, kind in LEARNERS.items() if not kind.takes_steps),
        choices=tuple(LEARNERS),
    )
    parser.flag(
        method,
        "--optimizer",
        str.lower,
        None,
        "what takes the steps, with the learning rate of --lr or the search: the released code's Adam, or "
        "SGD, which the paper speaks of",
        shown="adam",
        choices=tuple(OPTIMIZERS),
    )
    heads = parser.add_argument_group("heads that need no gradient")
    parser.flag(
        heads,
        "--features",
        str.lower,
        None,
        "what is seen of the network: the input of its head, its gate, or both side by side",
        shown=_of_each_learner("features") + "; gated in a network without a gate",
        choices=VIEWS,
    )
    parser.flag(
        heads,
        "--power",
        _positive,
        None,
        "exponent that features are raised to before they get unit length; 1 leaves them as they are",
        shown=_of_each_learner("power"),
    )
    parser.flag(
        heads,
        "--shrinkage",
        _share,
        None,
        "part of the covariance that is replaced by a multiple of the identity",
        shown=_of_each_learner("shrinkage"),
    )

    network = parser.add_argument_group("network, for --scratch without --model")
    _treatment(parser, network, None)
    _widths(parser, network)
    # None tells a flag that was not given from one that was.
    parser.set_defaults(**dict.fromkeys(("scratch", "iid", "reset", "freeze")))

    evaluation = parser.add_argument_group("evaluation")
    parser.flag(
        evaluation,
        "--schedule",
        _several(_whole(1)),
        None,
        "class counts to learn, each a curve's point, at most the outputs of the network; with fewer outputs "
        "than --test_classes, they stand for the classes of a draw in order, not for those of the data",
        shown=f"{' '.join(map(str, SCHEDULE))}; of fewer classes those that fit, and all",
        nargs="+",
        action=_Flat,
        metavar="N",
    )
    parser.flag(evaluation, "--runs", _whole(1), 10, "class draws per class count")
    parser.switch(
        evaluation,
        "--nested",
        "serve all class counts of --schedule with one pass over each draw, in search and report: after n "
        "classes test on these n, and go on. A quarter of the work with the default schedule. Each point of "
        "a curve has the same distribution as without, but the points are not independent of each other",
    )
    _test_classes(parser, evaluation, "meta-test classes that draws are made from")
    parser.flag(
        evaluation,
        "--class_order",
        str.lower,
        "random",
        "order in which classes are learned: drawn for each run, or that of the data",
        choices=("random", "dataset"),
    )
    _split(parser, evaluation)
    parser.flag(
        evaluation,
        "--track_every",
        _whole(0),
        0,
        "classes between measurements, while the first run of each class count is under way, of the "
        "accuracy on every class learned so far; 0 for none",
    )
    evaluation.add_argument(
        "--resume",
        type=_path,
        metavar="RUN_FOLDER",
        help="go on with an evaluation that was interrupted, in its run folder and with its arguments: "
        "what it measured is not measured again; --runs and --schedule may ask for more (default: none)",
    )

    search = parser.add_argument_group("learning rate")
    parser.flag(search, "--lr", _positive, None, "learning rate of Adam; skips the search", shown="search")
    parser.flag(
        search,
        "--lrs",
        _several(_positive),
        None,
        "learning rates to search",
        shown=" ".join(f"{rate:g}" for rate in LEARNING_RATES),
        nargs="+",
        action=_Flat,
        metavar="LR",
    )
    parser.flag(
        search,
        "--lr_search_runs",
        _whole(1),
        None,
        "class draws of each model, each trying every rate; the rate that wins most draws, of all "
        "models together, is used: rates that are equal on a draw share its win, and of those with as "
        "many wins it is the one with the best mean over all draws, then the smallest",
        shown=str(OF_STEPS["lr_search_runs"]),
    )
    parser.flag(
        search,
        "--lr_search_split",
        str.lower,
        None,
        "classes to search on: those reported on, as released, or the meta-training classes, "
        "which keeps the choice blind to what is reported",
        shown="evaluation",
        choices=("evaluation", "background"),
    )
    parser.switch(
        search,
        "--full_search",
        "try every rate on every draw, instead of leaving out tries that cannot change which rate is chosen",
    )
    parser.switch(
        search,
        "--test",
        "choose the rate by meta-test test accuracy instead of meta-test train accuracy; both "
        "are reported either way",
    )
    parser.set_defaults(test=None)

    _data(parser)
    run = _run(parser, name="Omni_test_traj", seed=222)
    _processes(parser, run, "class draws and learning rates")

    released = parser.add_argument_group("flags of the released code, accepted without effect")
    parser.without_effect(released, "--memory", "no image is kept or replayed at meta-test")
    parser.without_effect(released, "--neuromodulation", "the model file says which network it is")
    _commit(parser, released)
    return parser


def analysis_parser() -> Parser:
    """The flags of `python -m tools.analyze_representation`."""
    parser = Parser(
        "Measure and draw a model's features and gate on classes it has never seen.", _check_analysis
    )
    analysis = parser.add_argument_group("analysis")
    parser.flag(
        analysis,
        "--model",
        _path,
        None,
        "model file that mrcl_classification.py or pretrain_classification.py wrote",
        shown="none: it must be given",
        metavar="FILE",
    )
    _test_classes(parser, analysis, "meta-test classes to look at")
    _split(parser, analysis)
    parser.flag(
        analysis, "--samples", _whole(1, 20), 6, "images whose activations are drawn, of different classes"
    )
    parser.flag(
        analysis,
        "--alphabets",
        _whole(1),
        5,
        "alphabets in the picture of the embedding, the first of the data",
    )
    _data(parser)
    _run(parser, name="representation", seed=222)
    return parser


def plot_parser() -> Parser:
    """The flags of `python -m tools.plot_results`."""
    parser = Parser("Draw accuracy against the number of classes, and the final accuracy as bars.", _no_check)
    group = parser.add_argument_group("figures")
    group.add_argument(
        "results",
        nargs="+",
        metavar="[LABEL=]RESULTS",
        help="run folders of evaluate_classification.py, for --against training of mrcl_classification.py, "
        "or their results.csv or metrics.csv; LABEL names one in the figures",
    )
    parser.flag(
        group,
        "--against",
        str,
        "classes",
        "what accuracy is drawn against: the number of classes learned; the meta-steps that the models of an "
        "evaluation (its --model A.net B.net ...) were trained for, a curve per class count; or, of run "
        "folders of mrcl_classification.py, what these measured at each step of the training",
        choices=("classes", "steps", "training"),
    )
    parser.switch(
        group,
        "--published",
        "add published numbers to results on Omniglot, of the treatments that labels or results name, else "
        "of ANML",
        default=True,
    )
    parser.flag(group, "--out", _path, Path("runs/figures"), "folder for the figures", metavar="DIR")
    parser.flag(group, "--name", _folder_name, "results", "start of the figures' file names")
    return parser


def ledger_parser() -> Parser:
    """The flags of `python -m tools.ledger`."""
    parser = Parser("Write published numbers beside ours into docs/results.md.", _no_check)
    group = parser.add_argument_group("ledger")
    parser.switch(group, "--check", "change nothing; exit code 1 if the page is not what would be written")
    root = Path(__file__).resolve().parents[1]
    for name, kind, text in (
        ("results", "DIR", "folder of targets.csv, manifest.csv and the results"),
        ("docs/results.md", "FILE", "file with the two marker lines of the ledger"),
    ):
        flag = "--page" if kind == "FILE" else "--results"
        parser.flag(group, flag, _path, root / name, text, shown=f"this project's {name}", metavar=kind)
    return parser


def comparison_parser() -> Parser:
    """The arguments of `python -m tools.compare_results`, which reads no config file."""
    parser = Parser("Test whether two evaluations differ, at each class count that both have.", _no_check)
    for name in ("A", "B"):
        text = "run folder of an evaluation, or its results.csv or results.json"
        parser.add_argument(name.lower(), type=_path, metavar=name, help=text)
    output = parser.add_argument_group("output")
    parser.switch(output, "--json", "print JSON instead of a table")
    return parser


def _of_each_learner(option: str) -> str:
    """The defaults of an option of heads: `0.5`, or `gated for ncm, map, both for slda`."""
    names: dict[object, list[str]] = {}
    for name, kind in LEARNERS.items():
        if option in (kind.options or {}):
            names.setdefault((kind.options or {})[option], []).append(name)
    texts = [f"{value} for {', '.join(of)}" for value, of in names.items()]
    return "; ".join(texts) if len(texts) > 1 else str(next(iter(names), "none"))


def _treatment(parser: Parser, group: argparse._ArgumentGroup, default: object) -> None:
    parser.flag(
        group,
        "--treatment",
        _known_treatment,
        default,
        "network: ANML (the released code's name for it is Neuromodulation), or another of the registry",
        shown=str(default or "ANML"),
        metavar=f"{{{','.join(_networks())}}}",
    )


def _networks() -> list[str]:
    """All names that `--treatment` takes."""
    return [*NETWORKS, *(name.capitalize() for name in ALIASES)]


def _model_name(network: str) -> str:
    """The model file that a network's training writes by default."""
    return NETWORKS[network].model_name or f"{network}_Model.net"


WIDTHS = {
    "nm_channels": "channels of each convolution of ANML's neuromodulatory network",
    "pln_channels": "channels of each convolution of the prediction network",
    "num_classes": "outputs of the head, no fewer than classes to train on or to learn in a meta-test",
    "hidden": "outputs of OML's first linear layer",
}
"""What the arguments of the published networks mean."""


def _widths(parser: Parser, group: argparse._ArgumentGroup) -> None:
    """A flag for each argument of each network's constructor; None where it is not given."""
    takers: dict[str, dict[str, tuple[type, Any]]] = {}
    for network, kind in NETWORKS.items():
        for name, argument in constructor_arguments(kind).items():
            takers.setdefault(name, {})[network] = argument
    for name, arguments in takers.items():
        defaults: dict[Any, list[str]] = {}
        for network, (_, default) in arguments.items():
            defaults.setdefault(default, []).append(network)
        shown = ", ".join(
            _spelled_default(value) + (f" for {' and '.join(names)}" if len(defaults) > 1 else "")
            for value, names in defaults.items()
        )
        text = WIDTHS.get(name, f"of {' and '.join(arguments)}")
        kind_of_value = next(iter(arguments.values()))[0]
        if kind_of_value is bool:
            parser.switch(group, f"--{name}", text)
            parser.set_defaults(**{name: None})
        else:
            read = _number if kind_of_value is float else _whole(1 if name in WIDTHS else 0)
            parser.flag(group, f"--{name}", read, None, text, shown=shown)


def _spelled_default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "none, it must be given"
    return "set by the others" if value is None else str(value)


def _fill_in_widths(parser: Parser, arguments: argparse.Namespace) -> None:
    """Give the flags of the network its defaults, and take those away that it does not have."""
    own = constructor_arguments(NETWORKS[arguments.treatment])
    for name, (_, default) in own.items():
        if getattr(arguments, name) is None:
            if default is inspect.Parameter.empty:
                parser.error(f"--treatment {arguments.treatment} needs --{name}")
            setattr(arguments, name, default)
    for name in _all_widths() - own.keys():
        setattr(arguments, name, None)


def _all_widths() -> set[str]:
    """Names of the constructors' arguments of all networks."""
    return {name for kind in NETWORKS.values() for name in constructor_arguments(kind)}


def _train_classes(parser: Parser, group: argparse._ArgumentGroup, text: str) -> None:
    shown = "all; 963 of Omniglot's 964"
    parser.flag(group, "--train_classes", _whole(1), None, f"{text}, the first of the data", shown=shown)


def _test_classes(parser: Parser, group: argparse._ArgumentGroup, text: str) -> None:
    shown = "all; 650 of Omniglot's 659"
    parser.flag(group, "--test_classes", _whole(1), None, f"{text}, the first of the data", shown=shown)


def _split(parser: Parser, group: argparse._ArgumentGroup) -> None:
    parser.flag(group, "--train_images", _whole(1), 15, "images of each class to learn")
    parser.flag(group, "--test_images", _whole(1), 5, "images of each class to test, none of those learned")
    parser.flag(
        group,
        "--split",
        str.lower,
        "random",
        "which images of a class these are: drawn for each run, or the first and the last of the data",
        choices=("random", "dataset"),
    )


def _data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    parser.flag(
        group,
        "--dataset",
        str.lower,
        "omniglot",
        "; ".join(f"{name}: {_first_line(loader)}" for name, loader in DATASETS.items()),
        choices=tuple(DATASETS),
    )
    parser.flag(
        group,
        "--dataset-path",
        _path,
        Path("data"),
        "folder of the images; of Omniglot, that holds its zips or folders or that they are downloaded to",
        metavar="DIR",
    )
    parser.flag(
        group,
        "--cache_dir",
        _path,
        Path("data/cache"),
        "folder for the decoded images",
        metavar="DIR",
    )
    for dataset, loader in DATASETS.items():
        for name, (kind, default, (text, low, high)) in loader_options(loader).items():
            text = f"{text} (with --dataset {dataset})".replace("%", "%%")
            if kind is bool:
                parser.switch(group, f"--{name}", text, default=default)
            else:
                read: Callable[[str], object] = (
                    _whole(low, high) if kind is int else _number if kind is float else str
                )
                shown = "none" if default is None else str(default)
                parser.flag(group, f"--{name}", read, default, text, shown=shown)


def _first_line(loader: Callable[..., object]) -> str:
    line = (loader.__doc__ or loader.__module__).strip().splitlines()[0].rstrip(".")
    return line.replace("%", "%%")  # argparse fills in what follows one


def data_source(arguments: argparse.Namespace) -> Source:
    """Where the images are, from the data flags."""
    options = {name: getattr(arguments, name) for name in loader_options(DATASETS[arguments.dataset])}
    return Source(arguments.dataset, arguments.dataset_path, arguments.cache_dir, options)


def _notice_other_data(arguments: argparse.Namespace) -> None:
    """Tell the user of data flags that belong to another data set."""
    own = loader_options(DATASETS[arguments.dataset])
    for dataset, loader in DATASETS.items():
        for name, flag in loader_options(loader).items():
            if name not in own and getattr(arguments, name) != flag.default:
                notice = f"--{name} has no effect: it is of --dataset {dataset}, not {arguments.dataset}"
                arguments.notices = (*arguments.notices, notice)


def _run(parser: Parser, name: str, seed: int) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("run")
    parser.flag(group, "--name", _folder_name, name, "name of the run folder, which a number is added to")
    parser.flag(group, "--runs_dir", _path, Path("runs"), "folder of run folders", metavar="DIR")
    parser.flag(group, "--seed", _SEED, seed, "seed of all random draws, 0 to 2**32-1")
    parser.flag(
        group,
        "--device",
        _device,
        "auto",
        "auto (the best available), cpu, cuda, cuda:N or mps",
    )
    parser.flag(group, "--threads", _whole(1), None, "CPU threads", shown="torch's choice")
    parser.flag(
        group,
        "--backend",
        str.lower,
        "auto",
        "layers of the networks: plain torch, fast ones with the same numbers up to rounding, or auto: "
        "fast on the CPU, plain elsewhere",
        choices=BACKENDS,
    )
    group.add_argument(
        "--config",
        type=_path,
        metavar="FILE",
        help="TOML file of flags, which flags typed here override (default: none)",
    )
    return group


def _processes(parser: Parser, group: argparse._ArgumentGroup, work: str) -> None:
    parser.flag(
        group,
        "--processes",
        _whole(1),
        1,
        f"processes on this machine, each with its part of the threads or a GPU of its own, for {work}; "
        "under torchrun there are as many as it starts",
        metavar="N",
    )


def _reports(parser: Parser, group: argparse._ArgumentGroup) -> None:
    parser.flag(group, "--log_every", _whole(1), 50, "steps between lines of the log")
    parser.flag(
        group,
        "--save_every",
        _whole(1),
        1000,
        "steps between writes of --model_name and of the training state that --resume goes on from, "
        "which the last step always writes",
    )


def _resume(parser: Parser, group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume",
        type=_path,
        metavar="RUN",
        help="run folder of an interrupted run, to go on from its last training state with its own "
        "arguments: on the CPU with the same --threads, to the same weights bit for bit. Of other "
        "flags only these may change: "
        + ", ".join(f"--{name}" for name in sorted(parser.may_change))
        + " (default: none)",
    )


def _commit(parser: Parser, group: argparse._ArgumentGroup) -> None:
    parser.without_effect(
        group, "--commit", "nothing is committed; the run folder records the current git commit"
    )


def _no_check(parser: Parser, arguments: argparse.Namespace) -> None:
    """Nothing contradicts."""


def _check_training(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other and fill in defaults that depend on others."""
    _notice_other_data(arguments)
    for learner, flags in LEARNER_FLAGS.items():
        for name, default in flags.items():
            typed = getattr(arguments, name)
            if learner == arguments.learner:
                setattr(arguments, name, default if typed is None else typed)
            elif typed is not None:
                parser.error(
                    f"{_flag(name, typed)} means nothing with --learner {arguments.learner}: drop it"
                )
    if arguments.checkpoint and arguments.saved_model is None:
        parser.error("--checkpoint needs --saved_model FILE, the weights to start from")
    if arguments.saved_model is not None and not arguments.checkpoint:
        parser.error("--saved_model needs --checkpoint as well to start from those weights")
    _fill_in_widths(parser, arguments)
    for smaller, larger in (
        ("tasks", "update_step"),
        ("tasks", "train_classes"),
        ("train_classes", "num_classes"),
        *((("eval_classes", "train_classes"),) if arguments.eval_every else ()),
    ):
        low, high = getattr(arguments, smaller), getattr(arguments, larger)
        if low is not None and high is not None and low > high:
            parser.error(f"--{smaller} {low} must not be larger than --{larger} {high}")
    if arguments.first_order and arguments.second_order_steps:
        parser.error("--first_order differentiates through no inner step: drop it or --second_order_steps")
    if arguments.learner == "sgd" and arguments.rln is None:
        arguments.rln = NETWORKS[arguments.treatment].rln_training
    if arguments.model_name is None:
        arguments.model_name = Path(_model_name(arguments.treatment))


def _check_pretraining(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other and fill in defaults that depend on others."""
    _notice_other_data(arguments)
    _fill_in_widths(parser, arguments)
    outputs, classes = arguments.num_classes, arguments.train_classes
    if None not in (outputs, classes) and classes > outputs:
        parser.error(f"--train_classes {classes} must not be larger than --num_classes {outputs}")


def _check_evaluation(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other and fill in defaults that depend on others."""
    _notice_other_data(arguments)
    _apply_learner(parser, arguments)
    if arguments.freeze is False:
        if arguments.rln:
            parser.error(f"--no-freeze means --rln 0: drop it, or drop --rln {arguments.rln}")
        arguments.rln = 0
    _apply_preset(parser, arguments)
    if arguments.model is None and not arguments.scratch:
        parser.error("give --model FILE, which mrcl_classification.py writes, or --scratch")
    if arguments.model is not None:
        twice = [str(path) for path in arguments.model if arguments.model.count(path) > 1]
        if twice:
            parser.error(f"--model names {twice[0]} twice")
        if arguments.scratch and len(arguments.model) > 1:
            parser.error("--scratch takes the network of one --model, not of several")
    steps = LEARNERS[arguments.learner].takes_steps
    if arguments.scratch and arguments.rln is None and steps:
        arguments.rln = 0
    if arguments.track_every and steps and (arguments.iid or arguments.epoch > 1):
        parser.error("--track_every follows classes learned one after another, once: drop --iid and --epoch")
    if arguments.nested and (arguments.iid or arguments.epoch > 1 or arguments.class_order != "random"):
        parser.error(
            "--nested tests on its way through classes learned one after another, once, in random order: "
            "drop --iid, --epoch and --class_order"
        )
    for name in ("schedule", "lrs"):  # what is there twice would be done twice
        if getattr(arguments, name) is not None:
            setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    if arguments.schedule is not None and arguments.test_classes is not None:
        longest = max(arguments.schedule)
        if longest > arguments.test_classes:
            parser.error(
                f"--schedule asks for {longest} classes of the {arguments.test_classes} that "
                "--test_classes allows: lower the one or raise the other"
            )
    if arguments.model is None:
        arguments.treatment = arguments.treatment or "ANML"
        _fill_in_widths(parser, arguments)
        return
    for name in ("treatment", *sorted(_all_widths())):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, None)
            notice = f"--{name} has no effect: the model file says which network it is"
            arguments.notices = (*arguments.notices, notice)


def _check_analysis(parser: Parser, arguments: argparse.Namespace) -> None:
    _notice_other_data(arguments)
    if arguments.model is None:
        parser.error("give --model FILE, which mrcl_classification.py writes")


def _apply_preset(parser: Parser, arguments: argparse.Namespace) -> None:
    """Set what `--treatment-preset` stands for, refuse typed flags that say otherwise, fill in the rest."""
    if arguments.treatment_preset is not None:
        row = TABLE[arguments.treatment_preset]
        if arguments.reset and not row.scratch:
            parser.error(f"--treatment-preset {row.name} keeps the weights it starts from: drop --reset")
        # The paper gives Oracles of 1 and of 20 passes: their number is the user's.
        epochs = arguments.epoch if row.iid and arguments.epoch else row.epochs
        means = {"rln": row.rln, "scratch": row.scratch, "iid": row.iid, "epoch": epochs}
        for name, value in means.items():
            typed = getattr(arguments, name)
            if typed is not None and typed != value:
                parser.error(
                    f"--treatment-preset {row.name} means {_flag(name, value)}, not {_flag(name, typed)}: "
                    "drop one of them"
                )
            setattr(arguments, name, value)
    defaults: dict[str, object] = {"scratch": False}
    if LEARNERS[arguments.learner].takes_steps:
        defaults |= {"iid": False, "epoch": 1}
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def _apply_learner(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that mean nothing to `--learner`, and fill in the defaults of others.

    Those of a head stay open where the network decides on one.
    """
    options = LEARNERS[arguments.learner].options
    for name in (*OF_STEPS, *OF_HEADS):
        if name in (OF_STEPS if options is None else options):
            if options is None and getattr(arguments, name) is None:
                setattr(arguments, name, OF_STEPS[name])
        elif getattr(arguments, name) is not None:
            flag = parser.flags[name].option_strings[0]
            parser.error(f"{flag} means nothing to --learner {arguments.learner}: drop one of them")


def _flag(name: str, value: object) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _config_tokens(parser: Parser, path: Path) -> list[str]:
    """The settings of a TOML file as the command-line tokens that say the same."""
    try:
        settings = tomllib.loads(read_text(path))
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror or error}")
    except ValueError as error:  # also what TOML and UTF-8 decoding raise
        parser.error(f"--config {path}: not a TOML file: {error}")
    return _tokens(parser, settings, path)


def _tokens(parser: Parser, settings: Mapping[str, object], path: Path) -> list[str]:
    """The settings that `path` holds as the command-line tokens that say the same."""
    tokens = []
    for key, value in settings.items():
        if key not in parser.flags:
            parser.error(f"{path}: unknown key {key!r}; --help lists the flags")
        spelled = _spelled(parser.flags[key], value)
        try:
            parsed = getattr(parser.parse_args(spelled), key)
        except argparse.ArgumentError as error:
            parser.error(f"{path}: {key}: {error.message}")
        if not _same_kind(value, parsed):
            kind = type(parsed[0]) if isinstance(parsed, list) else type(parsed)
            several = "one or more of " if isinstance(parsed, list) else ""
            parser.error(f"{path}: {key}: {value!r} is not {several}{_KINDS.get(kind, 'a text in quotes')}")
        tokens += spelled
    return tokens


def _spelled(action: argparse.Action, value: object) -> list[str]:
    """One token if it can be, so that a value which starts with a dash cannot be taken for a flag."""
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[1 if value is False else 0]]
    if isinstance(value, list):
        if action.nargs:
            return [option, *map(str, value)]
        value = ",".join(map(str, value))
    return [f"{option}={value}"]


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def _same_kind(given: object, parsed: object) -> bool:
    """Whether a TOML value is of its flag's type: 1 may stand for 1.0, "1" and true may not."""
    if isinstance(parsed, list):  # of which one value alone is one as well
        return all(map(_same_kind, given if isinstance(given, list) else [given], parsed))
    if isinstance(given, bool) or isinstance(parsed, bool):
        return given is parsed
    if isinstance(parsed, float):
        return isinstance(given, int | float)
    if isinstance(parsed, int):
        return isinstance(given, int)
    return isinstance(given, str)


class _Flat(argparse.Action):
    """Join the lists of a flag's values: `10 50`, `10,50` and `"10 50"` are the same."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [number for part in values or () for number in part])


class _WithoutEffect(argparse.Action):
    """Leave the namespace alone but for a notice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        notice = f"{option_string} has {self.help}"
        namespace.notices = (*namespace.notices, notice)


def _plain(option: str) -> str:
    """A flag's name with `-` and `_` made the same; anything else as it is."""
    return "--" + option[2:].replace("-", "_") if option.startswith("--") else option


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high` (`None`: no limit)."""
    span = f"of {low} or more" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {span}")
        return number

    return read


_SEED = _whole(0, 2**32 - 1)  # what every generator in use can be seeded with


def _share(text: str) -> float:
    number = _positive(text)
    if not 1e-6 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.000001 to 1")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _number_from_0(text: str) -> float:
    number = _number(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return number


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return number


def _several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of one or more numbers with commas or spaces between."""

    def read_all(text: str) -> list[Any]:
        parts = text.replace(",", " ").split()
        if not parts:
            raise argparse.ArgumentTypeError("expected at least one number")
        return [read(part) for part in parts]

    return read_all


def _known_preset(text: str) -> str:
    by_name = {name.lower(): name for name in TABLE}
    if text.lower() not in by_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(TABLE)}")
    return by_name[text.lower()]


def _known_treatment(text: str) -> str:
    by_name = {name.lower(): name for name in NETWORKS} | ALIASES
    if text.lower() not in by_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_networks())}")
    return by_name[text.lower()]


def _device(text: str) -> str:
    device = text.lower()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return device


def _path(text: str) -> Path:
    path = expand(text)
    if not _is_text(str(path)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a file's name")
    return path


def _is_text(text: str) -> bool:
    """Whether a name can be given to the system and written in a log: no NUL, no stray bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _folder_name(text: str) -> str:
    if not _is_text(text) or not text.strip(". ") or re.search(r"[/\\\0]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder's name; see --runs_dir")
    return text
