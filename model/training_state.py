"""Training states: what a run needs to go on exactly where it stood, in its run folder.

`state.pt` is a model file's content with Adam and the random generator, followed by a sha256 digest.
`state.previous.pt` is the one before, for when the newer one is damaged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.images import OMNIGLOT, Normalisation
from model.modelfactory import Network
from model.optimizer import Adam
from utils.checkpoint import model_content, model_fault, read_saved, save_content, write_saved
from utils.errors import UserError
from utils.files import atomic_write, keep_earlier
from utils.run import Run

log = logging.getLogger("anml")

FORMAT = "anml-state-1"
NAME, PREVIOUS = "state.pt", "state.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on, beside the arguments and the data.

    `network`, `widths` and `state_dict` are those of a model file; `step` counts the steps done.
    `optimizer` is what `Adam.state_dict` gives. `generator` is the state of the one generator that
    every draw of training comes from. `inner_rule` is the state dict of the inner loop's rule, where that
    has parameters. `normalisation` is that of the images.
    """

    network: str
    widths: dict[str, int]
    state_dict: dict[str, Tensor]
    optimizer: dict[str, list[Tensor]]
    generator: Tensor
    step: int
    inner_rule: dict[str, Tensor] = field(default_factory=dict)
    normalisation: Normalisation = OMNIGLOT

    def content(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The dict of a model file of a training with these arguments."""
        arguments = {**arguments, **self.normalisation.arguments()}
        return model_content(
            self.network, self.widths, self.state_dict, arguments, self.step, self.inner_rule
        )

    @classmethod
    def of(
        cls,
        net: Network,
        optimizer: Adam,
        generator: torch.Generator,
        step: int,
        inner_rule: nn.Module | None = None,
    ) -> TrainingState:
        """Where training stands after `step` steps: the tensors themselves, not copies."""
        model = net.network, net.widths, net.state_dict()
        rule = inner_rule.state_dict() if inner_rule else {}
        return cls(*model, optimizer.state_dict(), generator.get_state(), step, rule, net.normalisation)

    def restore(
        self,
        optimizer: Adam,
        generator: torch.Generator,
        source: str,
        inner_rule: nn.Module | None = None,
    ) -> None:
        """Put an optimizer of the restored weights, the generator and the inner rule where they stood.

        Raises:
            UserError: they do not belong to those weights; `source` names the state.
        """
        try:
            optimizer.load_state_dict(self.optimizer)
            generator.set_state(self.generator)
            if inner_rule is not None:
                inner_rule.load_state_dict(self.inner_rule)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{source} does not hold a state of this run: {error}") from error


def save_progress(
    run: Run,
    model_name: Path,
    state: TrainingState,
    arguments: Mapping[str, Any],
) -> None:
    """Write a training state to the run folder, then its model there and to `model_name`.

    What another run wrote to `model_name` is kept under another name. Its own is what is in the folder.

    Raises:
        UserError: one cannot be written, or the weights are not finite; what was there stays.
    """
    run.sync()
    save_state(run.folder, state, arguments)
    own = run.folder / "model.net"
    kept = keep_earlier(model_name, own)
    if kept is not None:
        log.warning("%s is the model of another training, and is kept as %s", model_name, kept)
    for path in (own, model_name):
        save_model(path, state, arguments)


def save_model(path: Path, state: TrainingState, arguments: Mapping[str, Any]) -> None:
    """Write the model of a training state; see `save_content`."""
    save_content(path, state.content(arguments))


def save_state(folder: Path, state: TrainingState, arguments: Mapping[str, Any]) -> None:
    """Write `state.pt` into a run folder, whole or not at all, keeping the one before.

    Raises:
        UserError: it cannot be written, or the weights are not finite; what was there stays.
    """
    content = {
        **state.content(arguments),
        "format": FORMAT,
        "optimizer": {key: [x.cpu() for x in values] for key, values in state.optimizer.items()},
        "generator": state.generator,
    }
    path = folder / NAME
    fault = _fault(content)
    if fault is not None:
        raise UserError(f"{path} is not written at step {state.step}: {fault}")
    with atomic_write(path, previous=folder / PREVIOUS) as file:
        file.write(write_saved(content, file))


def load_state(folder: Path) -> TrainingState | None:
    """The newest sound state of a run folder, on the CPU; None if the run ended before its first.

    A state that is damaged or missing costs a warning and the steps since the one before.

    Raises:
        UserError: there were states, and none is sound.
    """
    faults = []
    for path in (folder / NAME, folder / PREVIOUS):
        try:
            content = _read(path)
        except UserError as error:
            faults.append(str(error))
            continue
        if faults:
            log.warning("%s; going on from %s, step %d", faults[0], path.name, content["step"])
        return TrainingState(
            **{key: content[key] for key in ("network", "widths", "state_dict", "optimizer")},
            generator=content["generator"],
            step=content["step"],
            inner_rule=content.get("inner_rule", {}),
        )
    if not any((folder / name).exists() for name in (NAME, PREVIOUS, "model.net")):
        return None
    raise UserError(
        f"{'; '.join(faults)}; the last weights are in {folder / 'model.net'}, which meta-training with "
        "--checkpoint --saved_model starts a new run from"
    )


def _read(path: Path) -> dict[str, Any]:
    """The content of a state file. Raises UserError where it is absent or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    payload, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if digest != hashlib.sha256(payload).digest():
        raise UserError(f"{path} is cut short or altered: its checksum does not fit")
    try:
        content = read_saved(payload)
    except Exception as error:  # bytes that are no state make torch raise nearly anything
        raise UserError(f"{path} is not a training state") from error
    fault = _fault(content)
    if fault is not None:
        raise UserError(f"{path} is not a training state of this project: {fault}")
    return dict(content)


def _fault(content: object) -> str | None:
    """What is wrong with the dict of a state file; None if nothing is."""
    fault = model_fault(content, FORMAT)
    if fault is not None:
        return fault
    assert isinstance(content, dict)
    optimizer, generator = content.get("optimizer"), content.get("generator")
    if not isinstance(optimizer, dict) or not all(
        isinstance(values, list) and all(isinstance(x, Tensor) for x in values)
        for values in optimizer.values()
    ):
        return "its optimizer is not lists of tensors"
    if not isinstance(generator, Tensor) or generator.dtype != torch.uint8:
        return "its generator is not a state of one"
    return None
