"""Reads the models of an evaluation, which are of one treatment, and compares them by content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datasets import Source
from flags.evaluation import Evaluation
from model.modelfactory import Network, build, fingerprint, restore_model
from model.treatments import TABLE, Weights
from utils.checkpoint import load_checkpoint
from utils.command_line import read_config
from utils.errors import UserError

log = logging.getLogger("anml")


class Model(NamedTuple):
    """One model to test.

    Attributes:
        name: what the column `model` of the results holds: the file as it was typed, or `scratch`.
        net: the network.
        weights: what made its weights.
        sha256: hexadecimal digest of the file; empty without a file.
        step: meta-steps of its training.
        arguments: flags of its training; empty without a file.
    """

    name: str
    net: Network
    weights: Weights
    sha256: str = ""
    step: int = 0
    arguments: Mapping[str, Any] = {}

    @property
    def kind(self) -> str:
        """Weights and network in words, for messages."""
        return f"{self.weights} {self.net.network}"

    def about(self) -> dict[str, str | int]:
        """What `config.json` says of the model."""
        return {"name": self.name, "weights": self.weights, "sha256": self.sha256, "step": self.step}


def models_to_test(args: Evaluation) -> list[Model]:
    """The models of `--model`, each once, on the CPU; for `--scratch` one new network, of the shape of
    `--model` if that is given.

    Raises:
        UserError: a file is unreadable, or a model is not of the treatment of the others or of
            `--treatment-preset`.
    """
    models = [_load(path) for path in args.model or ()]
    for model in models[1:]:
        first = models[0]
        if (model.kind, model.net.widths) != (first.kind, first.net.widths):
            raise UserError(
                f"--model takes models of one treatment: {first.name} holds {first.kind} of "
                f"{first.net.widths}, {model.name} holds {model.kind} of {model.net.widths}"
            )
        if model.net.normalisation != first.net.normalisation:
            raise UserError(
                f"--model takes models trained on the same images: {first.name} and {model.name} normalise "
                "pixels otherwise"
            )
    if args.scratch:
        shape = models[0].net if models else None
        network, widths = (shape.network, shape.widths) if shape else (args.treatment, args.constructor)
        models = [
            Model("scratch", build(network, widths, torch.Generator().manual_seed(args.seed)), "random")
        ]
    if args.treatment_preset is not None:
        row, model = TABLE[args.treatment_preset], models[0]
        if row.network not in (model.net.network, None) or row.weights != model.weights:
            raise UserError(
                f"--treatment-preset {row.name} tests {row.weights} {row.network}; "
                f"{model.name} holds {model.kind}"
            )
    return _distinct(models)


def _load(path: Path) -> Model:
    saved = load_checkpoint(path)
    log.info("%s: %s after %d steps", path, saved.network, saved.step)
    net, sha256 = restore_model(saved, path), hashlib.sha256(path.read_bytes()).hexdigest()
    weights: Weights = "pretrained" if saved.arguments.get("weights") == "pretrained" else "meta-trained"
    return Model(str(path), net, weights, sha256, saved.step, saved.arguments)


def _distinct(models: list[Model]) -> list[Model]:
    """The models without those of the same weights as one before them, such as the last model that training
    kept beside its final one: counted twice, weights would narrow an interval over models."""
    kept: dict[str, Model] = {}
    for model in models:
        first = kept.setdefault(fingerprint(model.net), model)
        if first is not model:
            log.warning("%s holds the same weights as %s: it is left out", model.name, first.name)
    return list(kept.values())


def match_earlier(models: list[Model], decided: Mapping[str, Any], folder: Path) -> list[Model]:
    """The models under the names that the evaluation in a run folder gave them.

    Args:
        decided: what else must be as `config.json` has it: the plan, and what identifies the images.
        folder: of the evaluation that is resumed.

    Raises:
        UserError: models, by content, or something decided are not those of the folder.
    """
    config = read_config(folder)
    before = {**config, **config["plan"]}
    for key, value in decided.items():
        if before.get(key, value) != value:  # runs of commit d362890 have no data hash
            raise UserError(f"--resume {folder}: its {key} was {before.get(key)}, and is now {value}")
    earlier = config.get("models")
    if not isinstance(earlier, list) or len(earlier) != len(models):
        raise UserError(f"--resume {folder}: --model names {len(models)} models, not those it was begun with")
    matched = []
    for model, known in zip(models, earlier, strict=True):
        if not isinstance(known, dict) or known.get("sha256") != model.sha256:
            raise UserError(
                f"--resume {folder}: --model {model.name} is another file than the one it was begun with, "
                f"or has changed since: its sha256 is {model.sha256}"
            )
        matched.append(model._replace(name=str(known.get("name"))))
    return matched


def warn_of_other_data(models: Sequence[Model], source: Source) -> None:
    """Warn where a model was trained on the same data set with other options: of a folder that is split by a
    draw, the training may have seen the classes that are tested."""
    for model in models:
        if model.arguments.get("dataset") != source.dataset:
            continue
        for name, value in source.options.items():
            before = model.arguments.get(f"data_{name}", model.arguments.get(name, value))
            if before != value:
                log.warning(
                    "%s was trained with --%s %s, and this is %s: make sure that no class tested here was "
                    "trained on",
                    *(model.name, name, before, value),
                )
