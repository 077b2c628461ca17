"""The flags of `pretrain_classification.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flags.common import (
    PLACES,
    add_data,
    add_reports,
    add_resume,
    add_run,
    add_train_classes,
    add_treatment,
    add_widths,
    fill_in_widths,
    notice_other_data,
)
from utils.command_line import Parser, file_path, positive, whole


def pretraining_parser() -> Parser:
    """The flags of `pretrain_classification.py`; the default budget is what meta-training sees."""
    parser = Parser(
        "Train a network on shuffled images of all meta-training classes.\n\n"
        "    python pretrain_classification.py --images 420000",
        _check_pretraining,
    )
    parser.may_change = frozenset(
        ("log_every", "save_every", "device", "threads", "backend", "model_name", *PLACES)
    )

    method = parser.add_argument_group("method")
    add_treatment(parser, method, "OML")
    parser.flag(
        method,
        "--images",
        whole(1),
        1680000,
        "images to train on, counted each time they come: 20,000 steps of 84 in meta-training",
    )
    parser.flag(method, "--batch_size", whole(1), 84, "images per step")
    parser.flag(method, "--lr", positive, 0.0001, "learning rate of Adam")
    add_train_classes(parser, method, "classes to train on")

    network = parser.add_argument_group("network")
    add_widths(parser, network)

    add_data(parser)

    checks = parser.add_argument_group("checks on the way")
    add_reports(parser, checks)

    run = add_run(parser, name="pretrain", seed=9)
    default = "Pretrain_Model.net"
    parser.flag(run, "--model_name", file_path, Path(default), "file for the trained weights", metavar="FILE")
    add_resume(parser, run)
    return parser


def _check_pretraining(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other and fill in defaults that depend on others."""
    notice_other_data(arguments)
    fill_in_widths(parser, arguments)
    outputs, classes = arguments.num_classes, arguments.train_classes
    if None not in (outputs, classes) and classes > outputs:
        parser.error(f"--train_classes {classes} must not be larger than --num_classes {outputs}")
