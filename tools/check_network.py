"""Check a network of the registry, before hours of training are spent on it.

    python -m tools.check_network ANML

The network is built with its default arguments. A fault ends the check with one line that names the cause.
"""

from typing import Annotated

import torch

from datasets.images import SIZE, SIZES
from model.check import check_network
from model.modelfactory import NETWORKS, build, layer_parameters
from utils.command_line import parse
from utils.errors import run_script
from utils.flag import Flags, Range


class Check(Flags):
    __doc__ = (__doc__ or "").partition("The network is")[0]

    name: Annotated[str, "network of the registry", NETWORKS]
    size: Annotated[int, "side of the images", Range(*SIZES)] = SIZE


def main() -> None:
    args = parse(Check)
    check_network(args.name, every_cut=True, size=args.size)
    net = build(args.name, {}, torch.Generator(), args.size)
    layers = layer_parameters(net)
    number = sum(p.numel() for p in net.parameters())
    print(f"{args.name}: {number:,} parameters in {len(layers)} layers, all checks passed")
    for position, names in enumerate(layers):
        print(f"{position:3d}  {', '.join(names)}")


if __name__ == "__main__":
    run_script(main)
