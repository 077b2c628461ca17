"""Reads files of `torch.save` that hold more than tensors, and builds nothing but what they hold.

A pickle is a program: it may name any function and have it called. Here nothing it names is looked up.
Each class or function becomes a record of its name and of what was done with it, and tensors are made
from the records afterwards, by this module.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zips
TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER = "torch._utils._rebuild_parameter"
DEEPEST = 100  # of modules within modules


class Record:
    """An object of a pickle: what it was made of, and no behaviour.

    Attributes:
        name: the class or function that the pickle names, `module.name`, or `dict` for a plain one.
        arguments: what it was called with.
        state: what was set on it afterwards.
        items: what was stored in it by key.
    """

    name: ClassVar[str]

    def __new__(cls, *arguments: object) -> Record:
        """Made without `__init__`, as a pickle makes things."""
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        record.items = {}
        return record

    def __init__(self, *arguments: object) -> None:
        self.arguments: tuple[object, ...]
        self.state: object
        self.items: dict[str | int, object]

    def __call__(self, *arguments: object) -> Record:
        """A pickle may call what another call gave: one more record."""
        return _kind(f"{self.name}()")(*arguments)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        if not isinstance(key, str | int):  # hashing others could recurse as deep as the file says
            raise pickle.UnpicklingError("a key is neither a name nor a number")
        self.items[key] = value

    def append(self, value: object) -> None:
        self.items[len(self.items)] = value


def _kind(name: str) -> type[Record]:
    """A class of records of its own for each name, so that nothing done to one reaches another."""
    return type("Record", (Record,), {"name": name})


class _Reader(pickle._Unpickler):
    """Interprets the instructions that torch.save writes, and gives records for all they name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        return _kind(f"{module}.{name}")

    def persistent_load(self, pid: object) -> object:
        match pid:
            case ("storage", type() as kind, str(key), str(), int(length), *_) if issubclass(kind, Record):
                return self.storages.setdefault(key, Storage(kind.name, length))
            case ("module", kind, *_):  # of a file before torch 1.6, with the source beside it
                return kind
        raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")

    def load_empty_dict(self) -> None:
        self.append(_kind("dict")())  # type: ignore[attr-defined]

    # Protocol 2 is what torch.save writes. The instructions of others go, and those that build a dict
    # from whatever keys the file has.
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
        for op in pickletools.opcodes
        if op.proto <= 2 and op.name not in ("DICT", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID")
    }
    dispatch[ord("}")] = load_empty_dict


class Storage:
    """Numbers of a file, as it names them; `values` comes when the file's end is read."""

    def __init__(self, kind: str, length: int) -> None:
        if kind not in DTYPES or length < 0:
            raise pickle.UnpicklingError(f"it holds a {kind} of {length} numbers")
        self.dtype, self.length = DTYPES[kind], length
        self.values = torch.empty(0, dtype=self.dtype)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.length * self.dtype.itemsize

    def fill(self, data: bytes) -> None:
        if len(data) != self.size:
            raise EOFError("a tensor is cut short")
        self.values = torch.frombuffer(bytearray(data), dtype=self.dtype) if data else self.values


def read(path: Path) -> object:
    """What a file of `torch.save` holds: records, tensors not yet made (see :func:`tensors`).

    Both formats are read, the zip and the one before torch 1.6. Not read are sparse and quantised
    tensors, and files of TorchScript.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none, or damaged. This one for whatever is wrong in it.
    """
    data = Path(path).read_bytes()
    try:
        return _read_zip(data) if data.startswith(b"PK") else _read_legacy(data)
    except MemoryError:
        raise ValueError("it asks for more memory than there is") from None
    except Exception as error:  # a damaged pickle makes its reader raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from error


def _read_zip(data: bytes) -> object:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (root,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed, which torch.save does not do")
        folder = root.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        reader = _Reader(io.BytesIO(archive.read(root)))
        content = reader.load()
        for key, storage in reader.storages.items():
            storage.fill(archive.read(f"{folder}data/{key}"))
    return content


def _read_legacy(data: bytes) -> object:
    """Five pickles (magic number, version, machine, content, keys), then each storage's numbers."""
    file = io.BytesIO(data)
    if _Reader(file).load() != LEGACY_MAGIC:
        raise ValueError("it is not a file of torch.save")
    _Reader(file).load()
    machine = _Reader(file).load()
    if not isinstance(machine, Record) or machine.items.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    reader = _Reader(file)
    content = reader.load()
    keys = _Reader(file).load()
    if not isinstance(keys, list) or set(keys) != set(reader.storages):
        raise ValueError("its storages are not those it refers to")
    for key in keys:
        storage = reader.storages[key]
        if struct.unpack("<q", file.read(8)) != (storage.length,):
            raise EOFError("a tensor is cut short")
        storage.fill(file.read(storage.size))
    return content


def tensors(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a state dict, of a module as `state_dict` would name them, or of a dict
    that has one of these under a name.

    Raises:
        ValueError: a tensor that does not lie within the numbers of the file.
    """
    if not isinstance(content, Record) or depth > DEEPEST:
        return
    if content.name in (*TENSOR, PARAMETER):
        yield prefix.removesuffix("."), _tensor(content)
    elif isinstance(content.state, Record) and "_modules" in content.state.items:
        for group in ("_parameters", "_buffers", "_modules"):
            yield from tensors(content.state.items.get(group), prefix, depth + 1)
    elif content.name in ("dict", "collections.OrderedDict"):
        for name, value in content.items.items():
            yield from tensors(value, f"{prefix}{name}.", depth + 1)


def _tensor(record: Record) -> Tensor:
    """The tensor that a record describes."""
    match record.name, record.arguments:
        case name, (Record() as inner, *_) if name == PARAMETER and inner.name in TENSOR:
            return _tensor(inner)
        case name, (Storage() as storage, int(offset), tuple(size), tuple(stride), *_) if name in TENSOR:
            whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
            if whole and len(size) == len(stride):
                last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
                # Strides may repeat a number, but may not make more of the file than there is in it.
                if math.prod(size) <= len(storage.values) and (0 in size or last < len(storage.values)):
                    return storage.values.as_strided(size, stride, offset).clone()
    raise ValueError("a tensor does not lie within the numbers that the file has for it")
