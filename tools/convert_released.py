"""Turn a model of the released ANML code, or of higherANML, into one of this project.

    python -m tools.convert_released IN OUT

The released code saves whole modules, which cannot be loaded without running what the file says. They
are read here without running anything; see `tools/records.py`. The names and order of both are:

| file | names |
|---|---|
| released, ANML and OML | `vars.0`, `vars.1`, ... in the order of this project's parameters |
| higherANML | `rln.convBlock1.conv.weight` or `rln.encoder.0.0.weight`, ..., `nm...`, `nm.fc`, `fc` |
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.modelfactory import NETWORKS, Network
from tools.records import read, tensors
from utils.checkpoint import save_checkpoint
from utils.command_line import HelpFirst
from utils.errors import UserError, run_script, say
from utils.files import expand, keep_earlier

BLOCK = re.compile(r"(rln|nm)\.(?:convBlock(\d)\.(conv|norm|bn)|encoder\.(\d)\.([01]))\.(weight|bias)")
LINEAR = re.compile(r"(nm\.)?fc\.(weight|bias)")
RELEASED = re.compile(r"(?:.*\.)?vars\.(\d+)")


def convert(source: Path) -> tuple[Network, dict[str, Tensor], list[str]]:
    """The network of a foreign model file, on the meta device, its weights, and what is left over.

    A kernel for grey images becomes one for three equal channels, a third each: the same outputs.
    Left over are the statistics of norms that look at the sample alone, as they do here.

    Raises:
        UserError: the file is none of the known ones, is damaged, or a tensor does not fit.
    """
    try:
        found, weights = _weights(source)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"cannot read {source}: {error}") from error
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


def _weights(source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of a file by name, and those that are a network's parameters in our order."""
    found = dict(tensors(read(source)))
    return found, released(found) or higher_anml(found)


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


def main() -> None:
    parser = HelpFirst(prog="python -m tools.convert_released", description=__doc__)
    parser.add_argument("source", type=expand, metavar="IN", help="model file to read")
    parser.add_argument("target", type=expand, metavar="OUT", help="model file to write")
    args = parser.parse_args()
    net, weights, rest = convert(args.source)
    kept = keep_earlier(args.target)
    save_checkpoint(args.target, net.network, net.widths, weights, {"converted_from": str(args.source)}, 0)
    if kept is not None:
        say(f"{args.target} was there, and is kept as {kept}")
    say(f"{args.target}: {net.network} {net.widths}")
    if rest:
        say(f"not needed: {len(rest)} other tensors, {', '.join(rest[:3])}{', ...' * (len(rest) > 3)}")


if __name__ == "__main__":
    run_script(main)
