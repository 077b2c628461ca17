"""Convert a model file of the released ANML code, of higherANML or of GeMCL into one of this project.

    python -m tools.convert_released SOURCE TARGET
    python -m tools.convert_released GeMCL/experiments/omniglot/omniglot_PGLR_final/check_point pglr.net

The released code saves whole modules, and `torch.load` of a module can run code from the file. `Reader` reads
such files without running any. Names and order of the parameters are:

| file | names |
|---|---|
| released, ANML and OML | `vars.0`, `vars.1`, ... in the order of this project's parameters |
| higherANML | `rln.convBlock1.conv.weight` or `rln.encoder.0.0.weight`, ..., `nm...`, `nm.fc`, `fc` |
| GeMCL | `layers.0.0.weight`, ...: four blocks of convolution and batch norm, `Conv4` without a head |

A GeMCL file says neither the size of its images nor how their pixels are normalised: `--size` and `--pixels`
do.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from datasets.images import OMNIGLOT, SIZE, SIZES, Normalisation
from model.modelfactory import NETWORKS, Network, image_arguments
from utils.command_line import parse
from utils.errors import UserError, reason, run_script, say
from utils.files import Checkpoint, keep_earlier
from utils.flag import Flags, Range, Shown

WIDTHS = {
    "ANML": {"nm_channels": 0, "pln_channels": 14, "num_classes": -1},
    "OML": {"pln_channels": 0, "hidden": 12, "num_classes": -1},
    "Conv4": {"channels": 0},
}
"""For each constructor argument of a network, the position of the parameter with this first size."""

BIAS, MEAN = "0.bias", "1.running_mean"
GEMCL = ("0.weight", "1.weight", "1.bias", MEAN, "1.running_var", "1.num_batches_tracked")
"""Names of the tensors of GeMCL's blocks, without the convolution's bias."""


def _higher_anml(block: str, first: int, conv: str, norm: str) -> list[str]:
    """Names of higherANML's parameters; its blocks are called `block` and a number from `first` on."""
    trunk = [f"{block}{first + k}.{layer}" for k in range(3) for layer in (conv, norm)]
    owners = [*(f"nm.{layer}" for layer in trunk), "nm.fc", *(f"rln.{layer}" for layer in trunk), "fc"]
    return [f"{owner}.{part}" for owner in owners for part in ("weight", "bias")]


FORMS = (
    ("ANML", [f"vars.{number}" for number in range(28)]),
    ("OML", [f"vars.{number}" for number in range(16)]),
    ("ANML", _higher_anml("convBlock", 1, "conv", "norm")),
    ("ANML", _higher_anml("convBlock", 1, "conv", "bn")),
    ("ANML", _higher_anml("encoder.", 0, "0", "1")),
    ("Conv4", [f"layers.{block}.{part}" for block in range(4) for part in GEMCL]),
)
"""Networks, each with the names of its tensors in files, after a prefix, in the order of this project."""

PIXELS = {
    "omniglot": OMNIGLOT,
    "unit": Normalisation((0,), (255,)),
    "imagenet": Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "cifar": Normalisation((125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)),
}
"""Normalisations by the name that `--pixels` takes: the released ANML code's, and GeMCL's three, of which
`unit` makes pixels numbers from 0 to 1."""

DTYPES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "Long": torch.int64}
Storage = tuple[torch.dtype, int]  # type and number of its values
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value of files of torch.save before it wrote zips
# Limits far above any model: bytes of a file's pickles, objects searched for tensors (one object may be
# referenced many times), letters of a tensor's name.
PICKLES, OBJECTS, NAME = 2**22, 10_000, 1_000


def convert(
    source: Path, size: int | None = None, pixels: str | None = None
) -> tuple[Network, dict[str, Tensor], list[str]]:
    """The network of a foreign model file, on the meta device, its weights, and the names of unused tensors.

    The network gives the outputs that the file's network gives. A kernel for grey images is divided over
    three equal channels. `Conv4` has no bias before its norm: the file's bias is subtracted from the norm's
    running mean. GeMCL's files have no head: the head's weights are zeros, and a meta-test draws them anew.
    The released code's running statistics are unused, since its norms take those of each sample.

    Args:
        size: side of the images; without it 84 of GeMCL, else 28.
        pixels: key of `PIXELS`; without it `unit` of GeMCL's grey and `imagenet` of its coloured images, else
            `omniglot`.

    Raises:
        UserError: the file has no known form, is damaged, or a tensor has the wrong shape.
    """
    found = read(source)
    known = (
        (kind, [prefix + name for name in names])
        for kind, names in FORMS
        for prefix in [name.removesuffix(names[0]) for name in found if name.endswith(names[0])]
        if found.keys() >= {prefix + name for name in names}
        and not found.keys() & {f"{prefix}vars.{len(names)}", f"{prefix}layers.4.0.weight"}
    )
    kind, names = next(known, ("", []))
    if not kind:
        what = "neither a model of the released code nor of higherANML or GeMCL"
        raise UserError(f"{source} holds {len(found)} tensors and is {what}")
    if empty := [name for name in names if found[name].numel() == 0]:
        raise UserError(f"{source}: {empty[0]} is empty")
    for mean in [name for name in names if name.endswith(MEAN)]:
        bias = mean.removesuffix(MEAN) + BIAS
        value = found.pop(bias, torch.zeros_like(found[mean]))
        if value.shape != found[mean].shape:
            raise UserError(f"{source}: {bias} is {list(value.shape)}, {mean} {list(found[mean].shape)}")
        found[mean] = found[mean] - value
    widths = {width: len(torch.atleast_1d(found[names[k]])) for width, k in WIDTHS[kind].items()}
    gemcl, grey = kind == "Conv4", found[names[0]].shape[1:2] == (1,)
    with torch.device("meta"):
        net = NETWORKS[kind](**widths, size=size or (84 if gemcl else SIZE))
    net.normalisation = PIXELS[pixels or ("omniglot" if not gemcl else "unit" if grey else "imagenet")]
    state = net.state_dict()
    in_file = [name for name in state if not gemcl or not name.startswith("head.")]
    if len(in_file) != len(names):
        raise UserError(f"{source}: {kind} has {len(in_file)} tensors at --size {size}, not {len(names)}")
    fitted = {name: torch.zeros(parameter.shape) for name, parameter in state.items()}
    for name, foreign in zip(in_file, names, strict=True):
        value = found[foreign]
        if value.ndim == 4 and value.shape[1] == 1 and state[name].shape[1] == 3:
            value = value.expand(-1, 3, -1, -1) / 3
        if value.shape != state[name].shape:
            shapes = f"{list(value.shape)} where {kind} has {name} {list(state[name].shape)}"
            raise UserError(f"{source}: {foreign} is {shapes}")
        fitted[name] = value.to(state[name].dtype).contiguous()
    return net, fitted, [name for name in found if name not in names]


class Inert(dict[str | int, object]):
    """An inert stand-in for every dict, class and function that a file names, and for the objects made with
    them: a stand-in stores arguments, items and a state, and does nothing."""

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments
        self.state: object = None

    def __call__(self, *arguments: object) -> "Inert":
        return Inert(self.name, arguments)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: str | int, value: object) -> None:
        if not isinstance(key, str | int):  # hashing a nested tuple can take forever
            raise ValueError("a key is neither a name nor a number")
        super().__setitem__(key, value)


class Reader(pickle._Unpickler):
    """Interprets a pickle without importing or calling anything that the pickle names.

    The base class is Python's reader: in the C reader some instructions reserve as much memory as the file
    announces. Allowed are the instructions of protocol 2, which torch.save writes, without those that build a
    dict of any keys or take a registered object.

    Attributes:
        storages: type and length of each tensor's storage, by the storage's key.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
        for op in pickletools.opcodes
        if op.proto <= 2 and op.name not in ("DICT", "EXT1", "EXT2", "EXT4")
    }
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(Inert("dict"))
    dispatch[pickle.NEWOBJ[0]] = dispatch[pickle.REDUCE[0]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Inert:
        return Inert(f"{module}.{name}")

    def persistent_load(self, pid: object) -> object:
        """The key of a tensor's storage, or the class of a module saved with its source."""
        match pid:
            case ("storage", Inert(name=kind), str(key), str(), int(length), *_):
                self.storages.setdefault(key, (DTYPES[kind[len("torch.") : -len("Storage")]], length))
                return key
            case ("module", kind, *_):
                return kind
        raise ValueError("it refers to something that is not a tensor's storage")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file of `torch.save`: a state dict, a module, or a dict that holds one of them.

    Both formats are read, zips and the format before torch 1.6. Sparse and quantised tensors and TorchScript
    are refused. Memory is bounded by the size of the file.

    Raises:
        UserError: the file cannot be read, has another format, or is damaged.
    """
    try:
        data = path.read_bytes()
        return _tensors(*(_read_zip if data.startswith(b"PK") else _read_legacy)(data))
    except Exception as error:  # a damaged pickle makes the reader raise nearly anything
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def _read_zip(data: bytes) -> tuple[object, dict[str, Tensor]]:
    """Content of a zip, and the numbers of its storages by key."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if sum(info.file_size for info in entries.values()) > len(data):
            raise ValueError("it is compressed, which torch.save does not do")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("its numbers are not little-endian")
        reader = Reader(io.BytesIO(archive.read(entries["data.pkl"])[:PICKLES]))
        content = reader.load()
        return content, {
            key: _numbers(storage, archive.read(entries[f"data/{key}"]))
            for key, storage in reader.storages.items()
        }


def _read_legacy(data: bytes) -> tuple[object, dict[str, Tensor]]:
    """The same of the format before torch 1.6: five pickles (magic number, version, machine, content, keys),
    then length and numbers of each storage."""
    file = io.BytesIO(data[:PICKLES])
    readers = [Reader(file) for _ in range(5)]
    magic, _, machine, content, keys = (reader.load() for reader in readers)
    if magic != LEGACY_MAGIC or machine["little_endian"] is not True:
        raise ValueError("it is not a file of torch.save, or its numbers are not little-endian")
    numbers, end = {}, file.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("a storage has no name")
        dtype, length = readers[3].storages[key]
        start = end + 8  # 8 bytes of length, which the content has as well
        end = start + dtype.itemsize * length
        numbers[key] = _numbers((dtype, length), data[start:end])
    return content, numbers


def _numbers(storage: Storage, data: bytes) -> Tensor:
    """The numbers of a storage, of their type and their bytes."""
    dtype, length = storage
    if len(data) != dtype.itemsize * length:
        raise ValueError("a tensor is cut short")
    return torch.frombuffer(bytearray(data), dtype=dtype) if length else torch.empty(0)


def _tensors(content: object, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file's content by name; those of a module have their `state_dict` names."""
    found: dict[str, Tensor] = {}
    rest = [("", content)]
    for _ in range(OBJECTS):
        if not rest:
            return found
        name, value = rest.pop()
        if not isinstance(value, Inert) or len(name) > NAME:
            continue
        if value.name == "torch._utils._rebuild_parameter":
            rest.append((name, value.arguments[0]))
        elif value.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            found[name.removesuffix(".")] = _view(value.arguments, numbers)
        elif isinstance(value.state, Inert) and "_modules" in value.state:
            rest += [(name, value.state.get(group)) for group in ("_modules", "_buffers", "_parameters")]
        elif value.name in ("dict", "collections.OrderedDict"):
            rest += [(f"{name}{key}.", item) for key, item in reversed(value.items())]
    raise ValueError(f"it holds more than {OBJECTS} objects")


def _view(arguments: tuple[object, ...], numbers: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a file describes as a view of a storage's numbers."""
    match arguments:
        case (str(key), int(offset), tuple(size), tuple(stride), *_):
            view = numbers[key].as_strided(size, stride, offset)  # torch refuses a view beyond the storage
            # Strides may repeat numbers. A view larger than its storage could fill the memory.
            if view.numel() <= len(numbers[key]):
                return view
    raise ValueError("a tensor does not lie within the numbers that the file has for it")


class Conversion(Flags):
    __doc__ = (__doc__ or "").partition("The released code")[0]

    source: Annotated[Path, "model file to read"]
    target: Annotated[Path, "model file to write"]
    size: Annotated[int | None, "side of the images", Range(*SIZES), Shown("84 of GeMCL, else 28")] = None
    pixels: Annotated[
        str | None,
        "how pixels are normalised",
        tuple(PIXELS),
        Shown("unit or imagenet of GeMCL, else omniglot"),
    ] = None


def main() -> None:
    args = parse(Conversion)
    net, weights, rest = convert(args.source, args.size, args.pixels)
    kept = keep_earlier(args.target)
    arguments = {"converted_from": str(args.source), **image_arguments(net)}
    Checkpoint(net.network, net.widths, weights, arguments, 0).save(args.target)
    if kept is not None:
        say(f"{args.target} was there, and is kept as {kept}")
    say(f"{args.target}: {net.network} {net.widths} {image_arguments(net)}")
    if rest:
        say(f"not needed: {len(rest)} other tensors, {', '.join(rest[:3])}{', ...' * (len(rest) > 3)}")


if __name__ == "__main__":
    run_script(main)
