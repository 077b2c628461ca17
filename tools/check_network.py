"""Check a network of the registry, before hours of training are spent on it.

    python -m tools.check_network ANML

The network is built with its default arguments. A fault ends the check with one line that names the cause.
"""

import torch

from datasets.images import SIZE, SIZES
from model.check import check_network
from model.modelfactory import NETWORKS, build, layer_parameters
from utils.command_line import HelpFirst
from utils.errors import run_script
from utils.flag import whole


def main() -> None:
    parser = HelpFirst(prog="python -m tools.check_network", description=__doc__)
    parser.add_argument("name", choices=NETWORKS, metavar="NAME", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--size", type=whole(*SIZES), default=SIZE, metavar="N", help="side of the images")
    args = parser.parse_args()
    check_network(args.name, every_cut=True, size=args.size)
    net = build(args.name, {}, torch.Generator(), args.size)
    layers = layer_parameters(net)
    number = sum(p.numel() for p in net.parameters())
    print(f"{args.name}: {number:,} parameters in {len(layers)} layers, all checks passed")
    for position, names in enumerate(layers):
        print(f"{position:3d}  {', '.join(names)}")


if __name__ == "__main__":
    run_script(main)
