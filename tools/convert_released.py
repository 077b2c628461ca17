"""Turn a model of the released ANML code, or of higherANML, into one of this project.

    python -m tools.convert_released IN OUT

The released code saves whole modules, which cannot be loaded without running what the file says. They
are read here without running anything (`Reader`). The names and order of both are:

| file | names |
|---|---|
| released, ANML and OML | `vars.0`, `vars.1`, ... in the order of this project's parameters |
| higherANML | `rln.convBlock1.conv.weight` or `rln.encoder.0.0.weight`, ..., `nm...`, `nm.fc`, `fc` |
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from model.modelfactory import NETWORKS, Network
from utils.checkpoint import Checkpoint
from utils.command_line import HelpFirst
from utils.errors import UserError, run_script, say
from utils.files import expand, keep_earlier

BLOCK = re.compile(r"(rln|nm)\.(?:convBlock(\d)\.(conv|norm|bn)|encoder\.(\d)\.([01]))\.(weight|bias)")
LINEAR = re.compile(r"(nm\.)?fc\.(weight|bias)")
RELEASED = re.compile(r"(?:.*\.)?vars\.(\d+)")

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
DICTS = ("dict", "collections.OrderedDict")
TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER = "torch._utils._rebuild_parameter"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zips
# Limits, far above what a model takes: bytes of a file, bytes of its pickles, objects to look through for
# tensors (which may be there many times over), letters of a tensor's name.
FILE, PICKLES, OBJECTS, NAME = 2**30, 2**22, 10_000, 1_000


def convert(source: Path) -> tuple[Network, dict[str, Tensor], list[str]]:
    """The network of a foreign model file, on the meta device, its weights, and what is left over.

    A kernel for grey images becomes one for three equal channels, a third each: the same outputs.
    Left over are the statistics of norms that look at the sample alone, as they do here.

    Raises:
        UserError: the file is none of the known ones, is damaged, or a tensor does not fit.
    """
    try:
        found = read(source)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"cannot read {source}: {error}") from error
    weights = released(found) or higher_anml(found)
    if not weights:
        raise UserError(
            f"{source} holds {len(found)} tensors and is neither a model of the released code nor of "
            "higherANML"
        )
    for foreign, value in weights.items():
        if value.numel() == 0:
            raise UserError(f"{source}: {foreign} is empty")
    kind = "ANML" if len(weights) == 28 else "OML"
    net = _network(kind, list(weights.values()))
    expected = dict(net.named_parameters())
    fitted = {}
    for (name, parameter), (foreign, value) in zip(expected.items(), weights.items(), strict=True):
        if value.ndim == 4 and value.shape[1] == 1 and parameter.shape[1] == 3:
            value = value.expand(-1, 3, -1, -1) / 3
        if value.shape != parameter.shape:
            raise UserError(
                f"{source}: {foreign} is {list(value.shape)} where {kind} has {name} {list(parameter.shape)}"
            )
        fitted[name] = value.float().contiguous()
    return net, fitted, [name for name in found if name not in weights]


def released(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a module of the released code in order, by the names they have there."""
    numbered = {int(match[1]): name for name in found if (match := RELEASED.fullmatch(name))}
    if sorted(numbered) not in (list(range(28)), list(range(16))):
        return {}
    return {numbered[index]: found[numbered[index]] for index in sorted(numbered)}


def higher_anml(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a higherANML network in this project's order, by the names they have there."""
    places = {place: name for name in found if (place := _place(name)) is not None}
    return {places[place]: found[places[place]] for place in sorted(places)} if len(places) == 28 else {}


def _place(name: str) -> tuple[int, ...] | None:
    """Where a parameter of higherANML stands: network, block, layer, weight or bias."""
    name = name.removeprefix("state.")  # its own files hold the state dict under that name
    if match := BLOCK.fullmatch(name):
        net, old_block, old_layer, block, layer, kind = match.groups()
        number = int(old_block) - 1 if old_block else int(block)
        second = old_layer != "conv" if old_layer else layer == "1"
        return ("nm", "rln").index(net), number, int(second), int(kind == "bias")
    if match := LINEAR.fullmatch(name):
        return (0, 9, 0, int(match[2] == "bias")) if match[1] else (2, 0, 0, int(match[2] == "bias"))
    return None


def _network(kind: str, values: list[Tensor]) -> Network:
    """The network of the widths that the tensors have."""
    widths = {"pln_channels": _rows(values[14 if kind == "ANML" else 0]), "num_classes": _rows(values[-1])}
    if kind == "ANML":
        widths["nm_channels"] = _rows(values[0])
    else:
        widths["hidden"] = _rows(values[12])
    with torch.device("meta"):
        return NETWORKS[kind](**widths)


def _rows(value: Tensor) -> int:
    return value.shape[0] if value.ndim else 1


class Inert(dict[str | int, object]):
    """A class, a function or an object of a file: takes arguments, items and a state, and does nothing."""

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments
        self.state: object = None

    def __call__(self, *arguments: object) -> Inert:
        return Inert(self.name, arguments)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: str | int, value: object) -> None:
        if not isinstance(key, str | int):  # hashing others could recurse as deep as the file says
            raise pickle.UnpicklingError("a key is neither a name nor a number")
        super().__setitem__(key, value)

    def append(self, value: object) -> None:
        self[len(self)] = value


class Reader(pickle._Unpickler):
    """Interprets a pickle, which is a program, without looking up or calling anything that it names.

    In Python, where no instruction reserves memory for what the file only announces.
    """

    # Protocol 2 is what torch.save writes. The instructions of others go, and those that build a dict
    # from whatever keys the file has.
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
        for op in pickletools.opcodes
        if op.proto <= 2 and op.name not in ("DICT", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID")
    }
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(Inert("dict"))
    dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> Inert:
        return Inert(f"{module}.{name}")

    def persistent_load(self, pid: object) -> object:
        """The key of a tensor's storage, which is noted, or the class of a module saved with its source."""
        match pid:
            case ("storage", Inert(name=kind), str(key), str(), int(length), *_) if kind in DTYPES:
                self.storages.setdefault(key, (DTYPES[kind], length))
                return key
            case ("module", kind, *_):
                return kind
        raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file of `torch.save`: a state dict, a module, or a dict that has one of these.

    Both formats are read, the zip and the one before torch 1.6. Not read are sparse and quantised
    tensors, and files of TorchScript. Memory is taken for what is in the file, and not twice.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none, or damaged. This one for whatever is wrong in it.
    """
    with path.open("rb") as file:
        data = file.read(FILE + 1)
    try:
        if len(data) > FILE:
            raise ValueError(f"it is larger than {FILE} bytes")
        return _tensors(*(_read_zip(data) if data.startswith(b"PK") else _read_legacy(data)))
    except MemoryError:
        raise ValueError("it asks for more memory than there is") from None
    except KeyError as error:
        raise ValueError(f"it holds no {error}") from error
    except Exception as error:  # a damaged pickle makes its reader raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from error


def _read_zip(data: bytes) -> tuple[object, dict[str, Tensor]]:
    """What the pickle of a zip holds, and the numbers of its storages."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in entries.values())
        if not stored or sum(info.file_size for info in entries.values()) > len(data):
            raise ValueError("it is compressed, which torch.save does not do")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("its numbers are not little-endian")
        if entries["data.pkl"].file_size > PICKLES:
            raise ValueError(f"its pickle is larger than {PICKLES} bytes")
        reader = Reader(io.BytesIO(archive.read(entries["data.pkl"])))
        content = reader.load()
        return content, {
            key: _numbers(archive.read(entries[f"data/{key}"]), *storage)
            for key, storage in reader.storages.items()
        }


def _read_legacy(data: bytes) -> tuple[object, dict[str, Tensor]]:
    """The same of five pickles (magic number, version, machine, content, keys), then each storage's
    length and numbers."""
    file = io.BytesIO(data[:PICKLES])
    readers = [Reader(file) for _ in range(5)]
    if readers[0].load() != LEGACY_MAGIC:
        raise ValueError("it is not a file of torch.save")
    _, machine, content, keys = (reader.load() for reader in readers[1:])
    if not isinstance(machine, Inert) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    values, start = {}, file.tell()
    for key in keys if isinstance(keys, list) else ():
        dtype, length = readers[3].storages[str(key)]
        stop = start + 8 + dtype.itemsize * length
        if struct.unpack_from("<q", data, start) != (length,):
            raise EOFError("a tensor is cut short")
        values[key], start = _numbers(data[start + 8 : stop], dtype, length), stop
    return content, values


def _numbers(data: bytes, dtype: torch.dtype, length: int) -> Tensor:
    if len(data) != dtype.itemsize * length:
        raise EOFError("a tensor is cut short")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensors(content: object, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors of what a file holds; of a module, as `state_dict` would name them."""
    found: dict[str, Tensor] = {}
    rest = [("", content)]
    for _ in range(OBJECTS):
        if not rest:
            return found
        name, value = rest.pop()
        if not isinstance(value, Inert) or len(name) > NAME:
            continue
        state = value.state if isinstance(value.state, Inert) else {}
        if value.name == PARAMETER:
            rest.append((name, value.arguments[0]))
        elif value.name in TENSOR:
            found[name.removesuffix(".")] = _tensor(value.arguments, values)
        elif "_modules" in state:
            rest += [(name, state.get(group)) for group in ("_modules", "_buffers", "_parameters")]
        elif value.name in DICTS:
            rest += [(f"{name}{key}.", item) for key, item in reversed(value.items())]
    raise ValueError(f"it holds more than {OBJECTS} objects")


def _tensor(arguments: tuple[object, ...], values: Mapping[str, Tensor]) -> Tensor:
    """The view of a storage's numbers that a file describes."""
    match arguments:
        case (str(key), int(offset), tuple(size), tuple(stride), *_):
            whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
            if whole and len(size) == len(stride):
                last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
                # Strides may repeat a number, but may not make more of the file than there is in it.
                if math.prod(size) <= len(values[key]) and (0 in size or last < len(values[key])):
                    return values[key].as_strided(size, stride, offset)
    raise ValueError("a tensor does not lie within the numbers that the file has for it")


def main() -> None:
    parser = HelpFirst(prog="python -m tools.convert_released", description=__doc__)
    parser.add_argument("source", type=expand, metavar="IN", help="model file to read")
    parser.add_argument("target", type=expand, metavar="OUT", help="model file to write")
    args = parser.parse_args()
    net, weights, rest = convert(args.source)
    kept = keep_earlier(args.target)
    Checkpoint(net.network, net.widths, weights, {"converted_from": str(args.source)}, 0).save(args.target)
    if kept is not None:
        say(f"{args.target} was there, and is kept as {kept}")
    say(f"{args.target}: {net.network} {net.widths}")
    if rest:
        say(f"not needed: {len(rest)} other tensors, {', '.join(rest[:3])}{', ...' * (len(rest) > 3)}")


if __name__ == "__main__":
    run_script(main)
