"""Compare how fast this machine meta-trains and meta-tests with a textbook and with what the machine can do.

    python -m tools.benchmark                                  # everything, at paper size, under 2 minutes
    python -m tools.benchmark --json benchmark.json            # and keep the numbers
    python -m tools.benchmark --only second-order anml-13      # some of it

No data is needed. A line is a meta-step; at meta-test the frozen layers, an update or an answer, all for one
image; or a whole command, estimated by those. Columns:

- fast, plain: `--backend fast` and `--backend plain`.
- textbook: `tests/reference.py` in float32, image by image, frozen layers recomputed, unfused.
- machine: what the arithmetic takes at the machine's rate of convolutions (FLOPs of plain PyTorch, as torch
  counts them) and, of an update, Adam's pass at its rate of copies.

They are measured in turns, and ratios are medians over the turns, so that a machine that slows down or is
shared changes them little.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datasets.images import SIZE, normalise
from datasets.omniglot import DRAWINGS
from datasets.task_sampler import sample_task, sample_trajectory
from flags.evaluation import SCHEDULE, Evaluation
from flags.training import Training
from model.fast import Backend, capture, learner, meta_loss, use_backend
from model.fast.memory import keep_freed_memory
from model.learner import Settings
from model.meta_learner import MetaLearner, gather
from model.meta_test import CHUNK, FrozenOutputs, answers, learn, new_run
from model.modelfactory import ANML, build, constructor_arguments, trained_parameters
from tests import reference
from tools.timing import Rate, Spread, convolution_rate, copy_bandwidth, seconds, spread
from utils.command_line import Flags, choice, file_path, flag, parse, whole
from utils.device import choose_device
from utils.errors import run_script, say, try_to_write
from utils.files import check_writable, write_text
from utils.run import cpu_name

ORDERS = {"first-order": True, "second-order": False}
TREATMENTS = {"anml-13": ("ANML", 13), "anml-7": ("ANML", 7), "anml-0": ("ANML", 0), "oml-6": ("OML", 6)}
PARTS = (*ORDERS, *TREATMENTS)
BACKENDS: tuple[Backend, ...] = ("fast", "plain")

WIDTHS = {name: constructor_arguments(ANML)[name][1] for name in ("nm_channels", "pln_channels")}
TRAIN_IMAGES = 15  # of a class at meta-test
TEXTBOOK_IMAGES = 3  # in a turn of the textbook's meta-test
ADAM_BYTES = 4 * 7  # a weight, its gradient and two moments read; all but the gradient written
GIGA = 1e9
PART_SECONDS = 14  # after which a part begins no other turn
QUIET_SHARE, QUIET_RATE = 0.9, 0.8  # of the cores' time, and of the best rate, that a quiet machine gives
COLUMNS = (*BACKENDS, "textbook", "machine")


class Line(NamedTuple):
    """A line of the table: of each column its times in s, and how many times those of `fast` they are."""

    name: str
    seconds: dict[str, Spread]
    ratios: dict[str, float]


class Work(NamedTuple):
    """What is measured in each turn: for a line and a column, something done to `number` images or steps."""

    line: str
    column: str
    do: Callable[[], object]
    number: int = 1


class Setup(NamedTuple):
    """What all measurements share."""

    device: torch.device
    images: Tensor
    widths: dict[str, int]
    repeats: int
    copies: float  # bytes/s

    def network(self, kind: str) -> dict[str, int]:
        """The widths that a network of this kind has."""
        return self.widths if kind == "ANML" else {k: v for k, v in self.widths.items() if k != "nm_channels"}


def synthetic_images(classes: int, device: torch.device, seed: int = 0) -> Tensor:
    """Images that cost what Omniglot's cost: thin strokes on paper of one value, [C, 20, 1, 28, 28].

    A class is a smooth random landscape, its drawings are variations of it, ink is where a drawing is
    at sea level.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, 1, 5, 5, generator=generator)
    coarse = coarse + 0.3 * torch.randn(classes, DRAWINGS, 5, 5, generator=generator)
    height = F.interpolate(coarse, size=SIZE, mode="bilinear", align_corners=True)
    pixels = (height.abs() * (255 / 0.15)).clamp_(max=255).to(torch.uint8)
    return normalise(pixels.flatten(0, 1).to(device)).reshape(classes, DRAWINGS, 1, SIZE, SIZE)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the convolutions and matrix products of plain PyTorch code."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def in_turns(
    setup: Setup, works: Callable[[int], Iterable[Work]], floors: Mapping[str, Callable[[float], float]]
) -> tuple[list[Line], list[Rate]]:
    """A line for each line of the works, and the machine's rates of convolutions, one before each turn.

    Args:
        works: what is done in a turn, by its number from 1.
        floors: of a line, the s that the machine needs at a rate of convolutions (FLOP/s).
    """
    found: dict[str, dict[str, list[float]]] = {}
    rates: list[Rate] = []
    begin = time.perf_counter()
    for turn in range(1, setup.repeats + 1):
        if turn > 1 and time.perf_counter() - begin > PART_SECONDS:
            break
        rates.append(convolution_rate(setup.device))
        for work in works(turn):
            taken = seconds(work.do, setup.device) / work.number
            found.setdefault(work.line, {}).setdefault(work.column, []).append(taken)
    for name, floor in floors.items():
        found[name]["machine"] = [floor(rate.per_second) for rate in rates]
    return [
        Line(
            name,
            {column: spread(times) for column, times in of.items()},
            {
                column: median(b / a for a, b in zip(of["fast"], times, strict=True))
                for column, times in of.items()
            },
        )
        for name, of in found.items()
    ], rates


def measure_meta_step(setup: Setup, part: str) -> tuple[list[Line], list[Rate]]:
    """Meta-steps of ANML with the defaults of training; `part` is a key of `ORDERS`."""
    defaults = parse(Training, [])
    generator = torch.Generator().manual_seed(0)
    learners: dict[str, MetaLearner] = {}
    for backend in BACKENDS:
        net = build("ANML", setup.network("ANML"), torch.Generator().manual_seed(0)).to(setup.device)
        use_backend(net, backend)
        learners[backend] = MetaLearner(
            net,
            setup.images,
            generator,
            meta_lr=defaults.meta_lr,
            update_lr=defaults.update_lr,
            rln=defaults.rln,
            first_order=ORDERS[part],
            meta_loss=meta_loss(backend),
            capture=capture(backend),
        )
    weights = [parameter.detach().clone() for parameter in learners["plain"].net.parameters()]

    def step(backend: str) -> None:
        learners[backend].step(sample_trajectory([DRAWINGS] * len(setup.images), generator))

    def textbook() -> None:
        trajectory = sample_trajectory([DRAWINGS] * len(setup.images), generator)
        query, labels = gather(setup.images, trajectory.query)
        grey, classes = query.expand(-1, 3, -1, -1).contiguous(), labels.tolist()
        settings = len(trajectory.support), defaults.update_lr, defaults.rln, not ORDERS[part]
        reference.meta_gradient(weights, grey, classes, *settings)

    for _ in range(2):  # Adam's moments, the allocator, kernel choices
        step("fast")
    flops = count_flops(partial(step, "plain"))
    if not ORDERS[part]:
        # torch differentiates the inner steps with respect to the image as well, which nobody asks for.
        flops -= defaults.update_step * 2 * 3 * 9 * setup.widths["pln_channels"] * 26 * 26
    name = f"meta-step, {part.replace('-', ' ')}"
    works = [
        *(Work(name, backend, partial(step, backend)) for backend in BACKENDS),
        Work(name, "textbook", textbook),
    ]
    return in_turns(setup, lambda _: works, {name: lambda rate: flops / rate})


def measure_meta_test(setup: Setup, part: str) -> tuple[list[Line], list[Rate]]:
    """Frozen layers, updates and answers, each for an image; `part` is a key of `TREATMENTS`."""
    kind, rln = TREATMENTS[part]
    generator = torch.Generator().manual_seed(0)
    pool = setup.images[: setup.repeats + 1]
    task = sample_task([DRAWINGS] * len(pool), len(pool), generator, train_images=TRAIN_IMAGES)
    many = task.train[0].repeat(CHUNK, 1)[:CHUNK]  # as many as an evaluation tests at a time
    outputs, learners = {}, {}
    for backend in BACKENDS:
        net = build(kind, setup.network(kind), torch.Generator().manual_seed(0)).to(setup.device)
        use_backend(net, backend)
        trained = trained_parameters(net, rln)
        outputs[backend] = FrozenOutputs(net, pool, trained)
        learners[backend] = learner("adam", backend)(
            new_run(net, trained, generator), trained, Settings(0.001)
        )
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = reference.Adam(weights[2 * rln :], 0.001)

    def update(backend: Backend, turn: int) -> None:
        learn(learners[backend], outputs[backend], task.train[turn])

    def textbook(turn: int, *, tested: bool) -> None:
        for image, label in zip(*gather(pool, task.train[turn][:TEXTBOOK_IMAGES]), strict=True):
            grey = image.expand(3, -1, -1).contiguous()
            if tested:
                reference.logits_of(weights, grey).argmax()
            else:
                weights[:] = reference.meta_test_update(weights, grey, int(label), rln, optimizer)

    frozen, updated, tested = (f"{kind} --rln {rln}, {what}" for what in ("frozen layers", "update", "test"))

    def works(turn: int) -> Iterator[Work]:
        for backend in BACKENDS:
            index, output = task.train[turn], outputs[backend]
            if rln:  # all drawings of the class
                yield Work(frozen, backend, partial(output.get, index), DRAWINGS)
            yield Work(updated, backend, partial(update, backend, turn), TRAIN_IMAGES)
            yield Work(tested, backend, partial(answers, learners[backend], output, many), CHUNK)
        yield Work(updated, "textbook", partial(textbook, turn, tested=False), TEXTBOOK_IMAGES)
        yield Work(tested, "textbook", partial(textbook, turn, tested=True), TEXTBOOK_IMAGES)

    for work in works(0):
        work.do()
    flops = count_flops(partial(update, "plain", 0)) / TRAIN_IMAGES
    adam = ADAM_BYTES * sum(weight.numel() for weight in weights[2 * rln :]) / setup.copies
    return in_turns(setup, works, {updated: lambda rate: flops / rate + adam})


def evaluation_images(*, nested: bool, decided: bool) -> tuple[int, int]:
    """Images that an evaluation with default flags learns, and that it tests.

    Args:
        nested: with `--nested`.
        decided: at best, where one rate wins all draws at all class counts. Else at most: every try is
            made, and each class count has a best rate of its own.
    """
    defaults = parse(Evaluation, ["--scratch"])
    draws, apart, together = defaults.lr_search_runs, sum(SCHEDULE), max(SCHEDULE)
    tries = len(defaults.lrs) * (draws // 2 + 1 if decided else draws)
    searched, reported = together if nested else apart, together if nested and decided else apart
    learned = tries * searched + defaults.runs * reported
    return TRAIN_IMAGES * learned, DRAWINGS * (tries + defaults.runs) * apart


def estimate(lines: Sequence[Line]) -> Iterator[Line]:
    """Whole commands with default flags by what was measured, without start and reading data.

    For an evaluation, `low` is at best, and all else at most (see `evaluation_images`).
    """
    by_name = {line.name: line.seconds for line in lines}

    def sum_up(name: str, most: dict[str, float], least: dict[str, float]) -> Line:
        times = {column: Spread(most[column], least[column], most[column], 0) for column in most}
        return Line(name, times, {column: most[column] / most["fast"] for column in most})

    steps = Training.steps
    for order in ("first order", "second order"):
        if (step := by_name.get(f"meta-step, {order}")) is not None:
            whole = {column: steps * times.median for column, times in step.items()}
            yield sum_up(f"train command, {order}", whole, whole)
    for rln in (13, 0):
        if (update := by_name.get(f"ANML --rln {rln}, update")) is None:
            continue
        test = by_name[f"ANML --rln {rln}, test"]
        for nested in (False, True):
            most, least = (
                {column: learned * update[column].median + tested * test[column].median for column in test}
                for learned, tested in (evaluation_images(nested=nested, decided=d) for d in (False, True))
            )
            yield sum_up(f"evaluate command, --rln {rln}{' --nested' * nested}", most, least)


def digits(value: float) -> str:
    """Three of a number, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(line: Line) -> list[str]:
    """A line of the table: whole commands in hours, all else in milliseconds."""
    fast = line.seconds["fast"]
    unit, scale = ("ms", 1e3) if fast.number else ("h", 1 / 3600)
    return [
        f"{line.name}, {unit}",
        *(digits(scale * line.seconds[c].median) if c in line.seconds else "-" for c in COLUMNS),
        f"{digits(scale * fast.low)} - {digits(scale * fast.high)}" + f" ({fast.number})" * (fast.number > 0),
        *(f"{line.ratios[c]:.2f}" if c in line.ratios else "-" for c in COLUMNS[1:]),
    ]


def render(lines: Sequence[Line]) -> str:
    """The table for the terminal: first column to the left, the others to the right."""
    header = ["", *COLUMNS, "fast: range (n)", *(f"{column} / fast" for column in COLUMNS[1:])]
    rows = [header, *map(cells, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def busy(rates: Sequence[Rate], device: torch.device) -> str | None:
    """A warning where others took part of the machine while its rates were measured; None if not."""
    share = median(rate.share for rate in rates)
    low, high = (choose(rate.per_second for rate in rates) for choose in (min, max))
    if low >= QUIET_RATE * high and (share >= QUIET_SHARE or device.type != "cpu"):
        return None
    given = (
        f"cores gave this process {min(share, 1):.0%} of their time, and the " if device.type == "cpu" else ""
    )
    return (
        f"warning: this machine was busy, and times say little: the {given}rate of convolutions was between "
        f"{low / GIGA:.0f} and {high / GIGA:.0f} GFLOP/s"
    )


@dataclass(kw_only=True)
class Benchmark(Flags):
    __doc__ = (__doc__ or "").partition("No data")[0]

    only: list[str] = flag(PARTS, str, "parts to run", shown="all", nargs="+", choices=PARTS)
    repeats: int = flag(7, whole(1), "turns, of which the median is shown")
    nm_channels: int = flag(WIDTHS["nm_channels"], whole(1), "channels of NM")
    pln_channels: int = flag(WIDTHS["pln_channels"], whole(1), "channels of the PLN, and of OML")
    json: Path | None = flag(None, file_path, "write the numbers here as well", metavar="FILE")
    device: str = choice("auto", ("auto", "cpu", "cuda", "mps"), "where")
    threads: int | None = flag(None, whole(1), "CPU threads", shown="torch's choice")


def main() -> None:
    args = parse(Benchmark)
    if args.json is not None:
        check_writable(args.json, "--json")
    begin = time.perf_counter()
    device = choose_device(args.device, args.threads)
    keep_freed_memory()
    widths = {"nm_channels": args.nm_channels, "pln_channels": args.pln_channels}
    copies = copy_bandwidth(device)
    setup = Setup(device, synthetic_images(963, device), widths, args.repeats, copies.per_second)
    lines: list[Line] = []
    rates: list[Rate] = []
    for part in (part for part in PARTS if part in args.only):
        try_to_write(f"{time.perf_counter() - begin:5.0f} s  {part}\n", sys.stderr)
        measure = measure_meta_step if part in ORDERS else measure_meta_test
        found, of_part = measure(setup, part)
        lines += found
        rates += of_part
    lines += estimate(lines)
    flops_per_second = median(rate.per_second for rate in rates)
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "convolution_flops_per_second": flops_per_second,
        "copy_bytes_per_second": copies.per_second,
        "paper_size": widths == WIDTHS,
        "busy": busy(rates, device),
    }
    said = "{cpu}, {cores} cores, {threads} threads, device {device}, torch {torch}".format(**machine)
    say(f"{said}; {flops_per_second / GIGA:.0f} GFLOP/s, {copies.per_second / GIGA:.1f} GB/s\n")
    say(render(lines))
    say("\nEvaluations: at most (every try made, a rate for each class count); the range begins at best.")
    if machine["busy"] is not None:
        say(f"\n{machine['busy']}")
    if args.json is not None:
        numbers = {
            line.name: {column: times._asdict() for column, times in line.seconds.items()}
            | {"ratios": line.ratios}
            for line in lines
        }
        write_text(args.json, json.dumps({"machine": machine, "lines": numbers}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
