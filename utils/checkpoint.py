"""Model files: one dict of weights and what is needed to rebuild and trust them.

Loading one runs no code: only tensors and plain values come out of it, and each is checked.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_write

FORMAT = "anml-1"


@dataclass(frozen=True)
class Checkpoint:
    """What a model file holds.

    `network` and `widths` (its constructor's arguments) rebuild the network that `state_dict` (name of a
    parameter or buffer -> finite CPU tensor) belongs to; `arguments` are those of the training run and
    `step` counts its outer steps. `inner_rule` is the state dict of what the inner loop steps with, where
    that has learned parameters of its own.
    """

    network: str
    widths: dict[str, int]
    state_dict: dict[str, Tensor]
    arguments: dict[str, Any]
    step: int
    inner_rule: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    path: Path,
    network_name: str,
    widths: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    step: int,
    inner_rule: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model file that :func:`load_checkpoint` reads, whole or not at all.

    Raises:
        UserError: the file cannot be written, or the weights are not finite; an earlier file under
            `path` stays.
    """
    save_content(path, model_content(network_name, widths, state_dict, arguments, step, inner_rule))


def save_content(path: Path, content: Mapping[str, Any]) -> None:
    """Write what :func:`model_content` gives; see :func:`save_checkpoint`."""
    fault = model_fault(content)
    if fault is not None:
        raise UserError(f"{path} is not written at step {content['step']}: {fault}")
    with atomic_write(Path(path)) as file:
        write_saved(content, file)


def model_content(
    network_name: str,
    widths: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    step: int,
    inner_rule: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The dict of a model file, on the CPU."""
    content = {
        "format": FORMAT,
        "network": network_name,
        "widths": dict(widths),
        "state_dict": {name: _whole(value.detach().cpu()) for name, value in state_dict.items()},
        "arguments": dict(arguments),
        "step": step,
        "torch": str(torch.__version__),  # a subclass of str, which would not load
    }
    if inner_rule:
        content["inner_rule"] = {name: _whole(value.detach().cpu()) for name, value in inner_rule.items()}
    return content


def _whole(x: Tensor) -> Tensor:
    """The tensor, or a clone of a view, of which torch.save would write the whole storage."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def write_saved(content: Mapping[str, Any], file: BinaryIO) -> bytes:
    """`torch.save` into an open file, with nothing but the content in memory.

    Returns:
        the sha256 digest of what was written.

    Raises:
        OSError: of the file, which torch's own writer would report as an error of its own.
    """
    sink = _Sink(file)
    torch.save(content, cast(BinaryIO, sink))
    if sink.error is not None:
        raise sink.error
    return sink.digest.digest()


class _Sink:
    """A file for torch.save that never fails, but keeps its first error and writes nothing after it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, part: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(part)
                self.digest.update(part)
            except OSError as error:
                self.error = error
        return part.nbytes

    def flush(self) -> None:
        """Nothing: the file's owner closes it."""


def read_saved(data: bytes) -> Any:
    """What torch saved in `data`, on the CPU; nothing in it is run, whoever wrote it.

    Raises:
        Exception: bytes that torch did not save, or more than tensors and plain values, make it raise
            nearly anything.
    """
    with warnings.catch_warnings():
        # What torch warns of in a foreign file ends in one line of the caller's.
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a model file onto the CPU. That its tensors fit a network is for the network to say.

    Raises:
        UserError: there is no such file, or it is damaged, foreign or holds pickled code, as the
            models of the released code do.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the model {path}: {error.strerror or error}; "
            "mrcl_classification.py writes one under --model_name"
        ) from error
    try:
        content = read_saved(data)
    except Exception as error:  # bytes that are no checkpoint make torch raise nearly anything
        raise UserError(f"cannot load the model {path}: {_unreadable(path, data, error)}") from error
    fault = model_fault(content)
    if fault is not None:
        raise UserError(
            f"{path} is not a model of this project: {fault}; python -m tools.convert_released reads "
            "those of the released code and of higherANML"
        )
    return Checkpoint(
        network=content["network"],
        widths=content["widths"],
        state_dict=dict(content["state_dict"]),
        arguments=content["arguments"],
        step=content["step"],
        inner_rule=content.get("inner_rule", {}),
    )


def _unreadable(path: Path, data: bytes, error: Exception) -> str:
    """Why torch could not read `data`, from its first bytes: torch's messages vary by version."""
    archive, pickled = data.startswith(b"PK"), data.startswith(b"\x80")
    if (archive or pickled) and isinstance(error, pickle.UnpicklingError):
        return (
            "it holds pickled Python objects, as the models of the released code do, and loading those could "
            f"run code; python -m tools.convert_released {path} NEW.net reads such models without running any"
        )
    if archive or not data:
        return "the file is damaged or cut short; copy or train it again"
    return "it is not a model file; mrcl_classification.py writes one under --model_name"


def model_fault(content: object, format_name: str = FORMAT) -> str | None:
    """What is wrong with the dict of a model file; None if nothing is."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    if content.get("format") != format_name:
        return f"its format is {content.get('format')!r}, not {format_name!r}"
    network, widths, state_dict, arguments, step = (
        content.get(key) for key in ("network", "widths", "state_dict", "arguments", "step")
    )
    if not isinstance(network, str):
        return "it does not name its network"
    if not isinstance(widths, dict) or not all(
        isinstance(name, str) and type(value) in (int, float, bool, str) for name, value in widths.items()
    ):
        return "its widths are not numbers or texts"
    if not isinstance(arguments, dict) or not _is_plain(arguments):
        return "its arguments are not plain values"
    if type(step) is not int or step < 0:
        return "its step is not a count"
    inner_rule = content.get("inner_rule", {})
    if not isinstance(state_dict, dict) or not state_dict or not isinstance(inner_rule, dict):
        return "it holds no weights"
    for name, tensor in (*state_dict.items(), *inner_rule.items()):
        if not isinstance(name, str) or not _is_weight(tensor):
            return f"its {name!r} is not a tensor of numbers"
        if not bool(torch.isfinite(tensor).all()):
            return f"its {name!r} is not finite: the training diverged, lower its learning rates"
    return None


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_complex()
        and not value.is_quantized
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _is_plain(value: object) -> bool:
    """Whether a value is made of what JSON knows."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
