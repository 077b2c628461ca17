"""The flags of `mrcl_classification.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flags.common import (
    PLACES,
    add_commit,
    add_data,
    add_processes,
    add_reports,
    add_resume,
    add_run,
    add_train_classes,
    add_treatment,
    add_widths,
    default_model_name,
    fill_in_widths,
    notice_other_data,
)
from model.modelfactory import NETWORKS
from utils.command_line import (
    Parser,
    as_typed,
    file_path,
    fraction,
    non_negative,
    positive,
    whole,
)

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


def training_parser() -> Parser:
    """The flags of `mrcl_classification.py`; defaults are those of the released train command."""
    parser = Parser(
        "Meta-train ANML or another network and write the initial weights found.\n\n"
        "    python mrcl_classification.py --config configs/anml.toml",
        _check_training,
    )
    # How long, how often and where: none of these changes a number.
    parser.may_change = frozenset(
        (
            *("steps", "log_every", "save_every", "keep_every", "eval_every", "eval_classes"),
            *("device", "threads", "processes", "backend", "model_name", *PLACES),
        )
    )

    method = parser.add_argument_group("method")
    add_treatment(parser, method, "ANML")
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
        whole(0),
        None,
        "layers frozen in the inner loop, counted from the input (7: the whole neuromodulatory "
        "network of ANML; 6: the convolutions of OML); the outer step trains all",
        shown=", ".join(f"{kind.rln_training} for {name}" for name, kind in NETWORKS.items()),
    )
    parser.flag(
        method,
        "--steps",
        whole(1),
        20000,
        "outer (meta) steps; with prototypes, also the length of the cosine schedule",
    )
    parser.flag(
        method,
        "--meta_lr",
        positive,
        0.001,
        "learning rate of the outer Adam; with prototypes, of its first step",
    )
    parser.flag(method, "--update_lr", positive, 0.1, "learning rate of the inner SGD")
    parser.flag(method, "--update_step", whole(1), 20, "inner steps, that is images, per trajectory")
    parser.flag(method, "--tasks", whole(1), 1, "classes per trajectory, sharing the --update_step images")
    parser.flag(
        method,
        "--meta_batch",
        whole(1),
        1,
        "trajectories per outer step, whose meta-gradients are averaged; under torchrun the "
        "processes share them",
    )
    parser.flag(method, "--remember", whole(1), 64, "random images added to the trajectory's in the loss")
    add_train_classes(parser, method, "classes to meta-train on")
    parser.switch(
        method,
        "--first_order",
        "take inner gradients as constants, as the released code does, instead of "
        "differentiating through the inner loop",
    )
    parser.flag(
        method,
        "--second_order_steps",
        whole(0),
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
    parser.flag(prototypes, "--ways", whole(2), 60, "classes of an episode")
    parser.flag(prototypes, "--shots", whole(1), 3, "images of each that its mean is of")
    parser.flag(prototypes, "--queries", whole(1), 2, "images of each that are to be classified")
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
        non_negative,
        0.0,
        "strength of a random turn, stretch, shear and shift of every other image; 1 for up to 12 degrees, "
        "15 %%, 0.15 and 2 pixels",
    )
    parser.flag(
        prototypes,
        "--average",
        fraction,
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
    add_widths(parser, network)

    add_data(parser)

    checks = parser.add_argument_group("checks on the way")
    parser.flag(
        checks,
        "--eval_every",
        whole(0),
        0,
        "steps between small meta-tests on meta-training classes; 0 for none",
    )
    parser.flag(checks, "--eval_classes", whole(1), 20, "classes in each of those meta-tests")
    add_reports(parser, checks)

    run = add_run(parser, name="mrcl_omniglot", seed=9)
    add_processes(parser, run, "the trajectories of --meta_batch")
    parser.flag(
        run,
        "--keep_every",
        whole(0),
        0,
        "steps between models that stay in the run folder, as model_<step>.net; 0 for none",
    )
    parser.flag(
        run,
        "--model_name",
        file_path,
        None,
        "file for the trained weights",
        shown=", ".join(f"{default_model_name(name)} for {name}" for name in NETWORKS),
        metavar="FILE",
    )
    add_resume(parser, run)
    parser.switch(
        run,
        "--checkpoint",
        "start a new run from the weights in --saved_model; its draws follow from --seed and these weights, "
        "so that the same seed does not repeat those that made them",
    )
    parser.flag(
        run,
        "--saved_model",
        file_path,
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
    add_commit(parser, released)
    return parser


def _check_training(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other and fill in defaults that depend on others."""
    notice_other_data(arguments)
    for learner, flags in LEARNER_FLAGS.items():
        for name, default in flags.items():
            typed = getattr(arguments, name)
            if learner == arguments.learner:
                setattr(arguments, name, default if typed is None else typed)
            elif typed is not None:
                parser.error(
                    f"{as_typed(name, typed)} means nothing with --learner {arguments.learner}: drop it"
                )
    if arguments.checkpoint and arguments.saved_model is None:
        parser.error("--checkpoint needs --saved_model FILE, the weights to start from")
    if arguments.saved_model is not None and not arguments.checkpoint:
        parser.error("--saved_model needs --checkpoint as well to start from those weights")
    fill_in_widths(parser, arguments)
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
        arguments.model_name = Path(default_model_name(arguments.treatment))
