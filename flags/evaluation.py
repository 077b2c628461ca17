"""The flags of `evaluate_classification.py`."""

from __future__ import annotations

import argparse
from typing import Any

from flags.common import (
    PLACES,
    add_commit,
    add_data,
    add_processes,
    add_run,
    add_split,
    add_test_classes,
    add_treatment,
    add_widths,
    all_widths,
    fill_in_widths,
    notice_other_data,
)
from model.learner import VIEWS
from model.meta_test import LEARNERS
from model.optimizer import OPTIMIZERS
from model.treatments import TABLE
from utils.command_line import Flat, Parser, as_typed, file_path, positive, several, share, whole

# SPEC's grid, and four rates more at its upper end, where replications find the best one.
LEARNING_RATES = (
    *(0.003, 0.002, 0.0015, 0.001, 0.00085, 0.0006, 0.0004, 0.00035, 0.0003, 0.00025),
    *(0.0002, 0.00015, 0.0001, 0.00009, 0.00008, 0.00006, 0.00003, 0.00001),
)


SCHEDULE = (10, 50, 75, 100, 200, 300, 400, 500, 600)


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


def evaluation_parser() -> Parser:
    """The flags of `evaluate_classification.py`; defaults are the paper's main treatment."""
    parser = Parser(
        "Meta-test a model: learn unseen classes one after another, then measure accuracy.\n\n"
        "    python evaluate_classification.py --model Neuromodulation_Model.net --nested",
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
        file_path,
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
        whole(0),
        None,
        "layers frozen, counted from the input: ANML 13 trains the head alone, 7 the PLN, 6 the "
        "PLN and the gate's layer, 0 everything; OML 6 trains both linear layers, 7 the last",
        shown="the head alone (ANML 13, sANML 6), 6 for OML, 0 with --scratch",
    )
    parser.switch(method, "--freeze", "freeze layers; --no-freeze is the same as --rln 0", default=True)
    parser.switch(method, "--reset", "re-draw every trained layer before learning, not the head alone")
    parser.switch(method, "--iid", "shuffle the stream of images (the Oracle) instead of class after class")
    parser.flag(method, "--epoch", whole(1), None, "passes over the stream of images", shown="1")

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
        positive,
        None,
        "exponent that features are raised to before they get unit length; 1 leaves them as they are",
        shown=_of_each_learner("power"),
    )
    parser.flag(
        heads,
        "--shrinkage",
        share,
        None,
        "part of the covariance that is replaced by a multiple of the identity",
        shown=_of_each_learner("shrinkage"),
    )

    network = parser.add_argument_group("network, for --scratch without --model")
    add_treatment(parser, network, None)
    add_widths(parser, network)
    # None tells a flag that was not given from one that was.
    parser.set_defaults(**dict.fromkeys(("scratch", "iid", "reset", "freeze")))

    evaluation = parser.add_argument_group("evaluation")
    parser.flag(
        evaluation,
        "--schedule",
        several(whole(1)),
        None,
        "class counts to learn, each a curve's point, at most the outputs of the network; with fewer outputs "
        "than --test_classes, they stand for the classes of a draw in order, not for those of the data",
        shown=f"{' '.join(map(str, SCHEDULE))}; of fewer classes those that fit, and all",
        nargs="+",
        action=Flat,
        metavar="N",
    )
    parser.flag(evaluation, "--runs", whole(1), 10, "class draws per class count")
    parser.switch(
        evaluation,
        "--nested",
        "serve all class counts of --schedule with one pass over each draw, in search and report: after n "
        "classes test on these n, and go on. A quarter of the work with the default schedule. Each point of "
        "a curve has the same distribution as without, but the points are not independent of each other",
    )
    add_test_classes(parser, evaluation, "meta-test classes that draws are made from")
    parser.flag(
        evaluation,
        "--class_order",
        str.lower,
        "random",
        "order in which classes are learned: drawn for each run, or that of the data",
        choices=("random", "dataset"),
    )
    add_split(parser, evaluation)
    parser.flag(
        evaluation,
        "--track_every",
        whole(0),
        0,
        "classes between measurements, while the first run of each class count is under way, of the "
        "accuracy on every class learned so far; 0 for none",
    )
    evaluation.add_argument(
        "--resume",
        type=file_path,
        metavar="RUN_FOLDER",
        help="go on with an evaluation that was interrupted, in its run folder and with its arguments: "
        "what it measured is not measured again; --runs and --schedule may ask for more (default: none)",
    )

    search = parser.add_argument_group("learning rate")
    parser.flag(search, "--lr", positive, None, "learning rate of Adam; skips the search", shown="search")
    parser.flag(
        search,
        "--lrs",
        several(positive),
        None,
        "learning rates to search",
        shown=" ".join(f"{rate:g}" for rate in LEARNING_RATES),
        nargs="+",
        action=Flat,
        metavar="LR",
    )
    parser.flag(
        search,
        "--lr_search_runs",
        whole(1),
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

    add_data(parser)
    run = add_run(parser, name="Omni_test_traj", seed=222)
    add_processes(parser, run, "class draws and learning rates")

    released = parser.add_argument_group("flags of the released code, accepted without effect")
    parser.without_effect(released, "--memory", "no image is kept or replayed at meta-test")
    parser.without_effect(released, "--neuromodulation", "the model file says which network it is")
    add_commit(parser, released)
    return parser


def _check_evaluation(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other and fill in defaults that depend on others."""
    notice_other_data(arguments)
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
    shuffled_or_repeated = arguments.iid or (arguments.epoch or 1) > 1
    if arguments.track_every and shuffled_or_repeated:
        parser.error("--track_every follows classes learned one after another, once: drop --iid and --epoch")
    if arguments.nested and (shuffled_or_repeated or arguments.class_order != "random"):
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
        fill_in_widths(parser, arguments)
        return
    for name in ("treatment", *sorted(all_widths())):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, None)
            notice = f"--{name} has no effect: the model file says which network it is"
            arguments.notices = (*arguments.notices, notice)


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
                    f"--treatment-preset {row.name} means {as_typed(name, value)}, not "
                    f"{as_typed(name, typed)}: drop one of them"
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


def _known_preset(text: str) -> str:
    by_name = {name.lower(): name for name in TABLE}
    if text.lower() not in by_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(TABLE)}")
    return by_name[text.lower()]


def _of_each_learner(option: str) -> str:
    """The defaults of an option of heads: `0.5`, or `gated for ncm, map, both for slda`."""
    names: dict[object, list[str]] = {}
    for name, kind in LEARNERS.items():
        if option in (kind.options or {}):
            names.setdefault((kind.options or {})[option], []).append(name)
    texts = [f"{value} for {', '.join(of)}" for value, of in names.items()]
    return "; ".join(texts) if len(texts) > 1 else str(next(iter(names), "none"))
