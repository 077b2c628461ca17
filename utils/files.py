"""Atomic writes of files; model files and training states.

A model file is one dict of weights and of the data needed to rebuild the network. Reading a file runs no
code: only tensors and plain values are read, and each is checked.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import os
import secrets
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError, refusing

MODEL, STATE = "anml-1", "anml-state-1"  # the formats of model files and of training states
NEEDED = {
    MODEL: ("network", "widths", "state_dict", "arguments", "step"),
    STATE: ("network", "widths", "state_dict", "arguments", "step", "optimizer", "generator"),
}
TYPES = {"str": str, "int": int, "dict": dict, "Tensor": Tensor}  # by the first word of an annotation


@contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path`, complete and on disk, when the block succeeds.

    Until then, and after an exception, `path` has its earlier content.

    Args:
        previous: a path in the same folder that gets the earlier content of `path`. If the process is killed
            between the two renames, that content is under `previous`, and nothing is under `path`.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    with refusing(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()


def sync(handle: int) -> None:
    """Sync an open file to the disk, where the file system has fsync; raises OSError for a full disk."""
    try:
        os.fsync(handle)
    except OSError as error:  # other errors mean that there is no fsync
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def keep_earlier(path: Path) -> Path | None:
    """Copy the file `path`, which is to be replaced, to `name.1.suffix` or the next free number.

    Returns:
        the copy's path; None if there is no file.

    Raises:
        UserError: a file cannot be read or written.
    """
    with refusing(f"read {path}"):
        if not path.exists():
            return None
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        kept = next(name for name in names if not name.exists())
        write_bytes(kept, path.read_bytes())
        return kept


def read_text(path: Path, what: str = "", hint: str = "") -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, with any line ends.

    Editors and spreadsheets of Windows write byte order marks.

    Args:
        what: names the file where it cannot be read; the path by default.
        hint: what to do then.

    Raises:
        UserError: the file cannot be read or is not text.
    """
    with refusing(f"read {what or path}", hint):
        content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except ValueError:
        raise UserError(f"{path} is not text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """The object in a JSON file; raises UserError like `read_text`, and where the file holds no object."""
    try:
        content = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically; see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically; see :func:`atomic_write`."""
    write_bytes(path, text.encode())


def check_writable(path: Path, flag: str) -> None:
    """Raise UserError if `path`, given by `flag`, cannot be written; called before a long run."""
    with refusing(f"write {flag} {path}"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@dataclass(frozen=True)
class Checkpoint:
    """The content of a model file or, with `optimizer` and `generator`, of a training state.

    Attributes:
        network: the network's name.
        widths: the arguments of its constructor.
        state_dict: parameters and buffers by name, without NaN and infinity (a mask may hold -inf).
        arguments: flags of the training run.
        step: outer steps done.
        inner_rule: the state dict of the inner loop's rule, if the rule has parameters.
        run: start time of the training, which identifies the training; empty if unknown.
        optimizer: moments and step counts, a tensor for each weight.
        generator: the state of the generator of all draws of the training.
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
        """The file's content; raises ValueError for values that a file may not hold, say infinite weights."""
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
        """The checkpoint that `to_bytes` wrote, on the CPU.

        Raises:
            ValueError: `data` is damaged, has another format, or holds more than tensors and plain values.
        """
        try:
            if data.startswith(b"PK"):  # a zip, whose checksums torch does not check
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    if archive.testzip() is not None:
                        raise ValueError("a checksum does not fit")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about the content of foreign files
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            fault = _fault(content, format_name)
        except Exception as error:  # torch raises nearly anything for foreign bytes
            raise ValueError(
                "the file is damaged, or it holds pickled Python objects, as the models of the released code "
                "do, and loading those could run code; python -m tools.convert_released IN.net NEW.net reads "
                "such models without running any"
            ) from error
        if fault is not None:
            raise ValueError(
                f"it is not a model of this project: {fault}; python -m tools.convert_released reads "
                "those of the released code, of higherANML and of GeMCL"
            )
        return cls(**{part.name: content[part.name] for part in fields(cls) if part.name in content})

    def save(self, path: Path, previous: Path | None = None) -> None:
        """Write a file that `of_bytes` reads, whole or not at all; for `previous` see :func:`atomic_write`.

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
    """The checkpoint of a model file, on the CPU. Whether its tensors fit a network is not checked here.

    Raises:
        UserError: the file is missing, damaged or foreign, or holds pickled code, as models of the released
            code do.
    """
    with refusing(f"read the model {path}", "; mrcl_classification.py writes one under --model_name"):
        data = path.read_bytes()
    try:
        return Checkpoint.of_bytes(data)
    except ValueError as error:
        raise UserError(f"cannot load the model {path}: {error}") from error


def _stored(value: Any) -> Any:
    """A value with its tensors copied to the CPU, since torch.save writes the whole storage of a view."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _stored(item) for key, item in value.items()}
    return [_stored(item) for item in value] if isinstance(value, list) else value


def _fault(content: Any, format_name: str) -> str | None:
    """The fault of a file's dict, for an error message; None without a fault."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    if content.get("format") != format_name:
        return f"its format is {content.get('format')!r}, not {format_name!r}"
    for part in fields(Checkpoint):
        value, hint = content.get(part.name), str(part.type)
        if part.name not in (content.keys() | NEEDED[format_name]):
            continue
        if not isinstance(value, TYPES[hint.replace("[", " ").split()[0]]):
            return f"its {part.name} is a {type(value).__name__}"
        fault = _fault_of(value, part.name, tensors="Tensor" in hint)
        if fault is not None:
            return fault
    return "it holds no weights" if not content["state_dict"] or content["step"] < 0 else None


def _fault_of(value: Any, name: str, tensors: bool) -> str | None:
    """The fault of a value, which may hold tensors, or else values of JSON; None without a fault."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            return f"its {name} has keys that are no texts"
        return next(filter(None, (_fault_of(item, f"{key}", tensors) for key, item in items)), None)
    if not tensors:
        plain = value is None or isinstance(value, str | int | float)
        return None if plain else f"its {name!r} is not a plain value"
    numbers = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not numbers or value.is_complex() or value.is_quantized:
        return f"its {name!r} is not a tensor of numbers"
    if not bool((value.double() < math.inf).all()):
        return f"its {name!r} is not finite: the training diverged, lower its learning rates"
    return None
