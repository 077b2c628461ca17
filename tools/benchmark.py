"""Measure the speed of meta-training and meta-test, beside a textbook version and the machine's own rate.

    python -m tools.benchmark                                  # all parts, at paper size, under 2 minutes
    python -m tools.benchmark --only second-order anml-13      # two parts

No data is needed. A line is a meta-step or, at meta-test, one image's pass through the frozen layers, update
or answer. Columns, in ms:

- fast, plain: `--backend fast` and `--backend plain`.
- textbook: `tests/reference.py` in float32, image by image, frozen layers recomputed, unfused.
- machine: the time of the FLOPs of plain PyTorch (as torch counts them) at the machine's rate of convolutions
  and, for an update, of Adam's pass at the machine's rate of copies.

All columns are measured in turns. Times and ratios are medians over the turns. A machine that slows down or
is shared then changes the ratios little.
"""

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from datasets import glyphs
from datasets.images import SIZE, SIZES, ImageSet
from evaluation.results import aligned
from flags.training import Training
from model.fast import BACKENDS
from model.fast.memory import keep_freed_memory
from model.learner import Given
from model.meta_test import CHUNK, FrozenOutputs, answers, learn, new_run
from model.modelfactory import ANML, NETWORKS, Network, build, trained_parameters
from model.outer_loop import gather
from model.outer_loops import TrajectoryLoop
from tests import reference
from utils.command_line import parse
from utils.distributed import choose_device
from utils.errors import run_script, say, try_to_write
from utils.flag import Flags, Range, Shown, arguments
from utils.run import cpu_name

ORDERS = {"first-order": True, "second-order": False}
TREATMENTS = {"anml-13": ("ANML", 13), "anml-7": ("ANML", 7), "anml-0": ("ANML", 0), "oml-6": ("OML", 6)}
PARTS = (*ORDERS, *TREATMENTS)
COLUMNS = ("fast", "plain", "textbook", "machine")

WIDTHS = {name: arguments(ANML)[name].default for name in ("nm_channels", "pln_channels")}
TRAIN_IMAGES = 15  # images of a class at meta-test (paper)
TEXTBOOK_IMAGES = 3  # images in the textbook's meta-test, which is slow
ADAM_BYTES = 4 * 7  # per weight: reads weight, gradient, two moments; writes all but the gradient
PART_SECONDS = 13  # a part begins no turn after this time
QUIET_SHARE, QUIET_RATE = 0.9, 0.8  # a quiet machine's least share of core time, and of the best rate
CALLS = 3  # a rate is the median of so many calls
COPIED = 64 * 2**20  # float32 values, far more than a cache holds

Rate = tuple[float, float]
"""A rate per second, and the share of its threads' time that this process got: nearly 1 on a quiet CPU, less
on a busy one; 1 on a GPU."""
Works = dict[tuple[str, str], tuple[Callable[[], object], int]]
"""The work of a turn and its number of images, by line and column of the table."""
Part = tuple[Works, str, int]
"""Works, the line with a `machine` column, and its bytes moved by Adam."""
Times = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds of each turn, by line and column of the table."""


def seconds(work: Callable[[], object]) -> float:
    """Time in s that `work` takes, its kernels on a device included."""
    start = timer()
    work()
    return timer() - start


@torch.no_grad()
def convolution_rate(device: torch.device) -> Rate:
    """FLOP/s of the PLN's second convolution over a query (nearly all of a meta-step), forward, float32."""
    x, kernel = torch.ones(84, 256, 13, 13, device=device), torch.ones(256, 256, 3, 3, device=device)
    F.conv2d(x, kernel)  # warm-up
    cpu, start = time.process_time(), time.perf_counter()
    taken = median(seconds(partial(F.conv2d, x, kernel)) for _ in range(CALLS))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    share = cpu / wall / torch.get_num_threads() if device.type == "cpu" else 1
    return 2 * 84 * 256**2 * 9 * 11**2 / taken, share


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of copying a large float32 tensor, read and written bytes both counted."""
    source, target = torch.ones(COPIED, device=device), torch.zeros(COPIED, device=device)
    return 2 * 4 * COPIED / median(seconds(partial(target.copy_, source)) for _ in range(CALLS))


def network(args: "Benchmark", kind: str, backend: str, device: torch.device) -> Network:
    """A network of this kind with the layers of `backend`."""
    widths = {name: getattr(args, name) for name in arguments(NETWORKS[kind]).keys() & WIDTHS}
    net = build(kind, widths, torch.Generator().manual_seed(0), args.size).to(device)
    BACKENDS[backend].prepare(net)
    return net


def meta_step(part: str, args: "Benchmark", images: ImageSet, device: torch.device) -> Part:
    """Meta-steps of ANML with the defaults of training; `part` is a key of `ORDERS`."""
    defaults, first_order = parse(Training, []), ORDERS[part]
    generator, pool = torch.Generator().manual_seed(0), images.pool(device)
    line, works = f"meta-step, {part.replace('-', ' ')}", Works()

    def step(learner: TrajectoryLoop) -> None:
        _, trajectory = learner.draw()
        learner.step(trajectory)

    for name, backend in BACKENDS.items():
        learner = TrajectoryLoop(
            *(network(args, "ANML", name, device), pool, generator),
            meta_lr=defaults.meta_lr,
            backend=backend,
            **defaults.loop | {"first_order": first_order},
        )
        works[line, name] = partial(step, learner), 1
    weights = [parameter.detach().clone() for parameter in learner.net.parameters()]

    def textbook() -> None:
        _, trajectory = learner.draw()
        query, labels = gather(pool, trajectory.query)
        grey, classes = query.expand(-1, 3, -1, -1).contiguous(), labels.tolist()
        settings = len(trajectory.support), defaults.loop["update_lr"], ANML.rln_training, not first_order
        reference.meta_gradient(weights, grey, classes, *settings)

    if args.size == SIZE:
        works[line, "textbook"] = textbook, 1
    return works, line, 0


def meta_test(part: str, args: "Benchmark", images: ImageSet, device: torch.device) -> Part:
    """Frozen layers, updates and answers for images of one class; `part` is a key of `TREATMENTS`."""
    kind, rln = TREATMENTS[part]
    frozen, updated, tested = (f"{kind} --rln {rln}, {what}" for what in ("frozen layers", "update", "test"))
    generator, pool = torch.Generator().manual_seed(0), images.first(1).pool(device)
    index = torch.tensor([(0, number) for number in range(TRAIN_IMAGES)])
    many = index.repeat(CHUNK, 1)[:CHUNK]  # as an evaluation tests `CHUNK` images at a time
    works, shown = Works(), pool[0]
    for name, backend in BACKENDS.items():
        net = network(args, kind, name, device)
        trained = trained_parameters(net, rln)
        outputs, run = FrozenOutputs(net, pool, trained), new_run(net, trained, generator)
        online = backend.adam_learner(run, trained, Given(0.001))
        if rln:
            works[frozen, name] = torch.no_grad()(partial(net.frozen, shown, trained)), len(shown)
        works[updated, name] = partial(learn, online, outputs, index), TRAIN_IMAGES
        works[tested, name] = partial(answers, online, outputs, many), CHUNK
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = reference.Adam(weights[2 * rln :], 0.001)
    few = shown[:TEXTBOOK_IMAGES].expand(-1, 3, -1, -1).contiguous()

    def update() -> None:
        for image in few:
            weights[:] = reference.meta_test_update(weights, image, 0, rln, optimizer)

    if args.size == SIZE:
        works[updated, "textbook"] = update, len(few)
    return works, updated, ADAM_BYTES * sum(weight.numel() for weight in weights[2 * rln :])


def measure(args: "Benchmark", device: torch.device, copies: float) -> tuple[Times, list[Rate]]:
    """The times of the parts that are asked for, and the rate of convolutions in each turn.

    Args:
        copies: bytes/s that the device copies.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        images = glyphs.load("background", Path(folder), Path(folder), args.size).limited(None, "")
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rates: list[Rate] = []
    for part in (part for part in PARTS if part in (args.only or PARTS)):
        try_to_write(f"{time.perf_counter() - begin:5.0f} s  {part}\n", sys.stderr)
        prepare = meta_step if part in ORDERS else meta_test
        works, line, moved = prepare(part, args, images, device)
        for work, _ in works.values():  # warm-up: Adam's moments, the allocator, kernel choices
            work()
        work, count = works[line, "plain"]
        with FlopCounterMode(display=False) as counter:
            work()
        flops, start = counter.get_total_flops() / count, time.perf_counter()
        for turn in range(args.repeats):
            if turn and time.perf_counter() - start > PART_SECONDS:
                break
            rates.append(convolution_rate(device))
            for (name, column), (work, count) in works.items():
                times[name][column].append(seconds(work) / count)
            times[line]["machine"].append(flops / rates[-1][0] + moved / copies)
    return times, rates


def render(times: Times) -> str:
    """The table for the terminal."""
    rows = [["ms", *COLUMNS, *(f"{column} / fast" for column in COLUMNS[1:])]]
    for line, of in times.items():
        ratios = {column: median(map(truediv, of[column], of["fast"])) for column in of}
        row = [line, *(f"{1e3 * median(of[column]):.4g}" if column in of else "-" for column in COLUMNS)]
        rows.append([*row, *(f"{ratios[column]:.2f}" if column in of else "-" for column in COLUMNS[1:])])
    return aligned(rows)


def busy(rates: Sequence[Rate]) -> str:
    """A warning if other processes used the machine while its rates were measured, else an empty text."""
    (low, _), (high, _), share = min(rates), max(rates), median(share for _, share in rates)
    if low >= QUIET_RATE * high and share >= QUIET_SHARE:
        return ""
    return (
        "\nwarning: this machine was busy, and times say little: "
        f"cores gave this process {min(share, 1):.0%} of their time, "
        f"and the rate of convolutions was from {low / 1e9:.0f} to {high / 1e9:.0f} GFLOP/s"
    )


class Benchmark(Flags):
    __doc__ = (__doc__ or "").partition("No data")[0]

    only: Annotated[list[str] | None, "parts to run", PARTS, Shown("all")] = None
    repeats: Annotated[int, "turns, of which the median is shown", Range(1)] = 7
    nm_channels: Annotated[int, "channels of NM", Range(1)] = WIDTHS["nm_channels"]
    pln_channels: Annotated[int, "channels of the PLN, and of OML", Range(1)] = WIDTHS["pln_channels"]
    size: Annotated[int, "side of the images; without the textbook, which is of 28", Range(*SIZES)] = SIZE
    device: Annotated[str, "where", ("auto", "cpu", "cuda", "mps")] = "auto"
    threads: Annotated[int | None, "CPU threads", Range(1), Shown("torch's choice")] = None


def main() -> None:
    args = parse(Benchmark)
    device = choose_device(args.device, args.threads)
    keep_freed_memory()
    copies = copy_bandwidth(device)
    times, rates = measure(args, device, copies)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {name}"
    rate = median(rate for rate, _ in rates)
    say(f"{machine}, torch {torch.__version__}; {rate / 1e9:.0f} GFLOP/s, {copies / 1e9:.1f} GB/s\n")
    say(render(times) + busy(rates))


if __name__ == "__main__":
    run_script(main)
