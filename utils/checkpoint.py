"""Model files and training states: one dict of weights and of what is needed to rebuild and trust them.

Reading a file runs no code: only tensors and plain values come out of it, and each is checked.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_write

MODEL, STATE = "anml-1", "anml-state-1"  # the formats of model files and of training states


@dataclass(frozen=True)
class Checkpoint:
    """The content of a model file or, with `optimizer` and `generator`, of a training state.

    Attributes:
        network: the network's name.
        widths: the arguments of its constructor.
        state_dict: parameters and buffers by name, without NaN and infinity (a mask may hold -inf).
        arguments: those of the training run.
        step: outer steps done.
        inner_rule: the state dict of the inner loop's rule, where the rule has parameters.
        run: when the training began, which tells it from other trainings; empty where that is not known.
        optimizer: moments and counts, a tensor for each weight.
        generator: the state of the one generator that every draw of training comes from.
    """

    network: str
    widths: dict[str, Any]
    state_dict: dict[str, Tensor]
    arguments: dict[str, Any]
    step: int
    inner_rule: dict[str, Tensor] = field(default_factory=dict)
    run: str = ""
    optimizer: dict[str, list[Tensor]] | None = None
    generator: Tensor | None = None

    def to_bytes(self) -> bytes:
        """The file's content.

        Raises:
            ValueError: a value is none that a file may hold, say a weight that is not finite.
        """
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        content = {name: _stored(value) for name, value in values.items() if value is not None}
        content["format"] = MODEL if self.optimizer is None else STATE
        content["torch"] = str(torch.__version__)  # a subclass of str, which would not load
        fault = _fault(content, content["format"])
        if fault is not None:
            raise ValueError(fault)
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    @classmethod
    def of_bytes(cls, data: bytes, format_name: str = MODEL) -> Checkpoint:
        """What `to_bytes` gave, on the CPU.

        Raises:
            ValueError: `data` is damaged, is another file's, or holds more than tensors and plain values.
        """
        try:
            if data.startswith(b"PK"):  # torch checks no checksums
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    if archive.testzip() is not None:
                        raise ValueError("a checksum does not fit")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is in a foreign file
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that torch did not save make it raise nearly anything
            raise ValueError(_unreadable(data, error)) from error
        fault = _fault(content, format_name)
        if fault is not None:
            raise ValueError(
                f"it is not a model of this project: {fault}; python -m tools.convert_released reads "
                "those of the released code and of higherANML"
            )
        return cls(**{part.name: content[part.name] for part in fields(cls) if part.name in content})

    def save(self, path: Path, previous: Path | None = None) -> None:
        """Write a file that `of_bytes` reads, whole or not at all.

        Args:
            previous: where to keep what is under `path` so far, in the same folder.

        Raises:
            UserError: the file cannot be written, or a weight is not finite; an earlier file stays.
        """
        try:
            data = self.to_bytes()
        except ValueError as error:
            raise UserError(f"{path} is not written at step {self.step}: {error}") from error
        with atomic_write(path, previous) as file:
            file.write(data)


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
        return Checkpoint.of_bytes(data)
    except ValueError as error:
        raise UserError(f"cannot load the model {path}: {error}") from error


def _stored(value: Any) -> Any:
    """A value with its tensors on the CPU. A view is cloned: torch.save would write its whole storage."""
    if isinstance(value, Tensor):
        x = value.detach().cpu()
        return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
    if isinstance(value, dict):
        return {key: _stored(item) for key, item in value.items()}
    return [_stored(item) for item in value] if isinstance(value, list) else value


def _unreadable(data: bytes, error: Exception) -> str:
    """Why torch could not read `data`, from its first bytes: torch's messages vary by version."""
    archive, pickled = data.startswith(b"PK"), data.startswith(b"\x80")
    if (archive or pickled) and isinstance(error, pickle.UnpicklingError):
        return (
            "it holds pickled Python objects, as the models of the released code do, and loading those could "
            "run code; python -m tools.convert_released IN OUT reads such models without running any"
        )
    if archive or not data:
        return "the file is damaged or cut short; copy or train it again"
    return "it is not a model file; mrcl_classification.py writes one under --model_name"


def _fault(content: Any, format_name: str) -> str | None:
    """What is wrong with the dict of a file; None if nothing is."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    if content.get("format") != format_name:
        return f"its format is {content.get('format')!r}, not {format_name!r}"
    if not isinstance(content.get("network"), str) or not isinstance(content.get("run", ""), str):
        return "it does not name its network and run"
    for name in ("widths", "arguments"):
        if not isinstance(content.get(name), dict) or not _is_plain(content[name]):
            return f"its {name} are not plain values"
    if type(content.get("step")) is not int or content["step"] < 0:
        return "its step is not a count"
    weights, inner_rule = content.get("state_dict"), content.get("inner_rule", {})
    if not isinstance(weights, dict) or not weights or not isinstance(inner_rule, dict):
        return "it holds no weights"
    for name, tensor in (*weights.items(), *inner_rule.items()):
        if not isinstance(name, str) or not _is_numbers(tensor):
            return f"its {name!r} is not a tensor of numbers"
        if not bool((tensor.double() < math.inf).all()):
            return f"its {name!r} is not finite: the training diverged, lower its learning rates"
    if format_name == MODEL:
        return None
    optimizer, generator = content.get("optimizer"), content.get("generator")
    if not isinstance(optimizer, dict) or not all(
        isinstance(values, list) and all(map(_is_numbers, values)) for values in optimizer.values()
    ):
        return "its optimizer is not lists of tensors"
    if not isinstance(generator, Tensor) or generator.dtype != torch.uint8:
        return "its generator is not a state of one"
    return None


def _is_numbers(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_complex()
        and not value.is_quantized
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is made of what JSON knows."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
