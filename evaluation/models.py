"""The models that an evaluation tests: read, of one treatment, known by their content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datasets import Source
from model.modelfactory import Network, build, fingerprint, restore_model
from model.treatments import TABLE, Weights
from utils.checkpoint import load_checkpoint
from utils.command_line import read_config
from utils.errors import UserError

log = logging.getLogger("anml")


class Model(NamedTuple):
    """One model to test.

    Attributes:
        name: its column `model` in the results: the file as it was typed, or `scratch`.
        net: the network.
        weights: how they were made.
        sha256: of the file, hexadecimal; empty without one.
        step: meta-steps that it was trained for.
        arguments: of its training; empty without one.
    """

    name: str
    net: Network
    weights: Weights
    sha256: str
    step: int
    arguments: Mapping[str, Any]

    def about(self) -> dict[str, str | int]:
        """What a run folder says of it."""
        return {"name": self.name, "weights": self.weights, "sha256": self.sha256, "step": self.step}


def load_models(paths: Sequence[Path]) -> list[Model]:
    """The models in files, on the CPU.

    Raises:
        UserError: a file is unreadable, or the models are not all of one treatment.
    """
    models = [_load(path) for path in paths]
    first = models[0]
    for model in models[1:]:
        if (_kind(model), model.net.widths) != (_kind(first), first.net.widths):
            raise UserError(
                f"--model takes models of one treatment: {first.name} holds {_kind(first)} of "
                f"{first.net.widths}, {model.name} holds {_kind(model)} of {model.net.widths}"
            )
        if model.net.normalisation != first.net.normalisation:
            raise UserError(
                f"--model takes models trained on the same images: {first.name} and {model.name} normalise "
                "pixels otherwise"
            )
    return models


def new_model(network: str, widths: Mapping[str, Any], seed: int) -> Model:
    """A model of `--scratch`: random weights that follow from `seed`.

    Args:
        network: a key of `NETWORKS`.
        widths: arguments of its class.
    """
    net = build(network, widths, torch.Generator().manual_seed(seed))
    return Model("scratch", net, "random", "", 0, {})


def check_preset(model: Model, preset: str | None) -> None:
    """Raise UserError where a model is not of the treatment of `--treatment-preset`."""
    if preset is None:
        return
    row = TABLE[preset]
    if row.network not in (model.net.network, None) or row.weights != model.weights:
        raise UserError(
            f"--treatment-preset {row.name} tests {row.weights} {row.network}; "
            f"{model.name} holds {_kind(model)}"
        )


def distinct(models: list[Model]) -> list[Model]:
    """The models without those whose weights another one before them has, such as the last model that
    training kept and its final one: counted twice they would narrow an interval over models.

    Their files may differ in what they say of the training.
    """
    kept: dict[str, Model] = {}
    for model in models:
        first = kept.setdefault(fingerprint(model.net), model)
        if first is not model:
            log.warning("%s holds the same weights as %s: it is left out", model.name, first.name)
    return list(kept.values())


def match_earlier(models: list[Model], data: Mapping[str, str], folder: Path) -> list[Model]:
    """The models under the names that the evaluation in a run folder gave them.

    Args:
        data: what identifies the data in use, as `config.json` has it.
        folder: of the evaluation that is resumed.

    Raises:
        UserError: models or data are not those of the folder, by content.
    """
    config = read_config(folder)
    for key, value in data.items():
        if config.get(key, value) != value:  # runs of commit d362890 have no data hash
            raise UserError(f"--resume {folder}: its {key} was {config.get(key)}, and is now {value}")
    recorded = config.get("models")
    # One that was begun before models were told apart goes on with the draws it gave to each file.
    if isinstance(recorded, list) and len(recorded) < len(models):
        models = distinct(models)
    if not isinstance(recorded, list) or len(recorded) != len(models):
        raise UserError(f"--resume {folder}: --model names {len(models)} files, not those it was begun with")
    matched = []
    for model, before in zip(models, recorded, strict=True):
        if not isinstance(before, dict) or before.get("sha256") != model.sha256:
            raise UserError(
                f"--resume {folder}: --model {model.name} is another file than the one it was begun with, "
                f"or has changed since: its sha256 is {model.sha256}"
            )
        matched.append(model._replace(name=str(before.get("name"))))
    return matched


def warn_of_other_data(models: Sequence[Model], source: Source) -> None:
    """Say where a model was trained on the same kind of data with other options: of a folder that is split
    by a draw, it may have seen the classes that it is tested on."""
    for model in models:
        if model.arguments.get("dataset") != source.dataset:
            continue
        for name, value in source.options.items():
            before = model.arguments.get(name, value)
            if before != value:
                log.warning(
                    "%s was trained with --%s %s, and this is %s: make sure that no class tested here was "
                    "trained on",
                    *(model.name, name, before, value),
                )


def weights_of(arguments: Mapping[str, Any]) -> Weights:
    """How the weights of a model file were made, from the arguments in it."""
    return "pretrained" if arguments.get("weights") == "pretrained" else "meta-trained"


def _load(path: Path) -> Model:
    saved = load_checkpoint(path)
    log.info("%s: %s after %d steps", path, saved.network, saved.step)
    net = restore_model(saved, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Model(str(path), net, weights_of(saved.arguments), sha256, saved.step, saved.arguments)


def _kind(model: Model) -> str:
    return f"{model.weights} {model.net.network}"
