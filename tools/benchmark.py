"""Compare how fast this machine meta-trains and meta-tests with a textbook and with what the machine can do.

    python -m tools.benchmark                                  # everything, at paper size, under 2 minutes
    python -m tools.benchmark --json benchmark.json            # and keep the numbers
    python -m tools.benchmark --only second-order anml-13      # some of it

No data is needed. A line is a meta-step or, at meta-test, the frozen layers, an update or an answer, each for
one image. Columns, in ms:

- fast, plain: `--backend fast` and `--backend plain`.
- textbook: `tests/reference.py` in float32, image by image, frozen layers recomputed, unfused.
- machine: what the arithmetic takes at the machine's rate of convolutions (FLOPs of plain PyTorch, as torch
  counts them) and, of an update, Adam's pass at the machine's rate of copies.

All are measured in turns, and ratios are medians over the turns, so that a machine that slows down or is
shared changes the ratios little.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datasets.images import SIZE, normalise
from datasets.omniglot import DRAWINGS
from datasets.task_sampler import sample_task, sample_trajectory
from evaluation.results import aligned
from flags.training import Training
from model.fast import BACKENDS
from model.fast.memory import keep_freed_memory
from model.learner import Settings
from model.meta_learner import MetaLearner, gather
from model.meta_test import CHUNK, FrozenOutputs, answers, learn, new_run
from model.method import InnerLoop
from model.modelfactory import ANML, NETWORKS, Network, build, trained_parameters
from tests import reference
from utils.command_line import parse
from utils.distributed import choose_device
from utils.errors import run_script, say, try_to_write
from utils.files import check_writable, write_text
from utils.flag import Flags, arguments, choice, file_path, flag, whole
from utils.run import cpu_name

ORDERS = {"first-order": True, "second-order": False}
TREATMENTS = {"anml-13": ("ANML", 13), "anml-7": ("ANML", 7), "anml-0": ("ANML", 0), "oml-6": ("OML", 6)}
PARTS = (*ORDERS, *TREATMENTS)
COLUMNS = ("fast", "plain", "textbook", "machine")

WIDTHS = {name: arguments(ANML)[name].default for name in ("nm_channels", "pln_channels")}
TRAIN_IMAGES = 15  # of a class at meta-test
TEXTBOOK_IMAGES = 3  # in a turn of the textbook's meta-test
ADAM_BYTES = 4 * 7  # a weight, its gradient and two moments read; all but the gradient written
PART_SECONDS = 14  # after which a part begins no other turn
QUIET_SHARE, QUIET_RATE = 0.9, 0.8  # of the cores' time, and of the best rate, that a quiet machine gives
CALLS = 3  # of which a rate is the median
COPIED = 64 * 2**20  # float32 values, far more than a cache holds

Rate = tuple[float, float]
"""What the machine does in a second, and the part of its threads' time that it gave to this process: nearly 1
on a quiet CPU, less where others or a quota take the cores. Of a GPU the second says nothing."""
Work = tuple[str, str, Callable[[], object], int]
"""What a turn measures: line and column of the table, and what is done to how many images or steps."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time in s that `work` takes on `device`, its kernels included."""
    moments = []
    for do in (list, work):  # nothing first, so that earlier kernels have ended
        do()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        moments.append(time.perf_counter())
    return moments[1] - moments[0]


@torch.no_grad()
def rate(amount: float, work: Callable[[], object], device: torch.device) -> Rate:
    """The rate of `work`, which does `amount` of something: the median of calls, after one not counted."""
    work()
    cpu, start = time.process_time(), time.perf_counter()
    times = [seconds(work, device) for _ in range(CALLS)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return amount / median(times), cpu / wall / torch.get_num_threads()


def convolution_rate(device: torch.device) -> Rate:
    """FLOP/s of the PLN's second convolution over a query, nearly all of a meta-step: forward, float32."""
    x, kernel = torch.ones(84, 256, 13, 13, device=device), torch.ones(256, 256, 3, 3, device=device)
    return rate(2 * 84 * 256**2 * 9 * 11**2, lambda: F.conv2d(x, kernel), device)


def copy_bandwidth(device: torch.device) -> Rate:
    """Bytes/s of copying a large float32 tensor, bytes read and bytes written both counted."""
    source, target = torch.ones(COPIED, device=device), torch.empty(COPIED, device=device)
    return rate(2 * 4 * COPIED, lambda: target.copy_(source), device)


@dataclass(frozen=True)
class Bench:
    """What all measurements share, and what they have found: by line and column the s of each turn, and the
    machine's rates of convolutions, one before each turn."""

    device: torch.device
    images: Tensor
    widths: dict[str, int]
    repeats: int
    copies: float  # bytes/s
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rates: list[Rate] = field(default_factory=list)

    def network(self, kind: str, backend: str) -> Network:
        """A network of this kind that computes as `backend` does."""
        widths = {name: self.widths[name] for name in arguments(NETWORKS[kind]).keys() & self.widths}
        net = build(kind, widths, torch.Generator().manual_seed(0)).to(self.device)
        BACKENDS[backend].prepare(net)
        return net

    def in_turns(
        self, works: Callable[[int], Iterable[Work]], line: str, floor: Callable[[float], float]
    ) -> None:
        """Measure the works of each turn, which `works` gives by the number of the turn from 1.

        Args:
            floor: the s that the machine needs for `line` at a rate of convolutions (FLOP/s).
        """
        begin = time.perf_counter()
        for turn in range(1, self.repeats + 1):
            if turn > 1 and time.perf_counter() - begin > PART_SECONDS:
                break
            self.rates.append(convolution_rate(self.device))
            taken = [(line, "machine", floor(self.rates[-1][0]))]
            taken += [(name, column, seconds(do, self.device) / n) for name, column, do, n in works(turn)]
            for name, column, value in taken:
                self.times.setdefault(name, {}).setdefault(column, []).append(value)

    def ratios(self, line: str) -> dict[str, float]:
        """How many times those of `fast` the times of each column are: the median over the turns."""
        fast, columns = self.times[line]["fast"], self.times[line].items()
        return {name: median(b / a for a, b in zip(fast, of, strict=True)) for name, of in columns}


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


def measure_meta_step(bench: Bench, part: str) -> None:
    """Meta-steps of ANML with the defaults of training; `part` is a key of `ORDERS`."""
    defaults = parse(Training, [])
    generator = torch.Generator().manual_seed(0)
    learners = {
        backend: MetaLearner(
            *(bench.network("ANML", backend), bench.images, generator),
            meta_lr=defaults.meta_lr,
            inner=InnerLoop(defaults.update_lr, 0 if ORDERS[part] else None),
            rln=ANML.rln_training,
            meta_loss=BACKENDS[backend].meta_loss,
            capture=BACKENDS[backend].capture,
        )
        for backend in BACKENDS
    }
    weights = [parameter.detach().clone() for parameter in learners["plain"].net.parameters()]

    def step(backend: str) -> None:
        learners[backend].step(sample_trajectory([DRAWINGS] * len(bench.images), generator))

    def textbook() -> None:
        trajectory = sample_trajectory([DRAWINGS] * len(bench.images), generator)
        query, labels = gather(bench.images, trajectory.query)
        grey, classes = query.expand(-1, 3, -1, -1).contiguous(), labels.tolist()
        settings = len(trajectory.support), defaults.update_lr, ANML.rln_training, not ORDERS[part]
        reference.meta_gradient(weights, grey, classes, *settings)

    for _ in range(2):  # Adam's moments, the allocator, kernel choices
        step("fast")
    flops = count_flops(partial(step, "plain"))
    if not ORDERS[part]:
        # torch differentiates the inner steps with respect to the image as well, which nobody asks for.
        flops -= defaults.update_step * 2 * 3 * 9 * bench.widths["pln_channels"] * 26 * 26
    name = f"meta-step, {part.replace('-', ' ')}"
    works: list[Work] = [(name, backend, partial(step, backend), 1) for backend in BACKENDS]
    works.append((name, "textbook", textbook, 1))
    bench.in_turns(lambda _: works, name, lambda rate: flops / rate)


def measure_meta_test(bench: Bench, part: str) -> None:
    """Frozen layers, updates and answers, each for an image; `part` is a key of `TREATMENTS`."""
    kind, rln = TREATMENTS[part]
    generator = torch.Generator().manual_seed(0)
    pool = bench.images[: bench.repeats + 1]
    task = sample_task([DRAWINGS] * len(pool), len(pool), generator, train_images=TRAIN_IMAGES)
    many = task.train[0].repeat(CHUNK, 1)[:CHUNK]  # as many as an evaluation tests at a time
    outputs, learners = {}, {}
    for backend in BACKENDS:
        net = bench.network(kind, backend)
        trained = trained_parameters(net, rln)
        outputs[backend] = FrozenOutputs(net, pool, trained)
        run = new_run(net, trained, generator)
        learners[backend] = BACKENDS[backend].adam_learner(run, trained, Settings(0.001))
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = reference.Adam(weights[2 * rln :], 0.001)

    def update(backend: str, turn: int) -> None:
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
                yield frozen, backend, partial(output.get, index), DRAWINGS
            yield updated, backend, partial(update, backend, turn), TRAIN_IMAGES
            yield tested, backend, partial(answers, learners[backend], output, many), CHUNK
        yield updated, "textbook", partial(textbook, turn, tested=False), TEXTBOOK_IMAGES
        yield tested, "textbook", partial(textbook, turn, tested=True), TEXTBOOK_IMAGES

    for *_, work, _ in works(0):
        work()
    flops = count_flops(partial(update, "plain", 0)) / TRAIN_IMAGES
    adam = ADAM_BYTES * sum(weight.numel() for weight in weights[2 * rln :]) / bench.copies
    bench.in_turns(works, updated, lambda rate: flops / rate + adam)


def render(bench: Bench) -> str:
    """The table for the terminal."""
    rows = [["ms", *COLUMNS, "fast: range (n)", *(f"{column} / fast" for column in COLUMNS[1:])]]
    for line, times in bench.times.items():
        fast, ratios = [1e3 * value for value in times["fast"]], bench.ratios(line)
        row = [line, *(f"{1e3 * median(times[c]):.4g}" if c in times else "-" for c in COLUMNS)]
        row.append(f"{min(fast):.4g} - {max(fast):.4g} ({len(fast)})")
        rows.append([*row, *(f"{ratios[c]:.2f}" if c in ratios else "-" for c in COLUMNS[1:])])
    return aligned(rows)


def busy(rates: Sequence[Rate], device: torch.device) -> str | None:
    """A warning where others took part of the machine while its rates were measured; None if not."""
    (low, _), (high, _), share = min(rates), max(rates), median(share for _, share in rates)
    if low >= QUIET_RATE * high and (share >= QUIET_SHARE or device.type != "cpu"):
        return None
    given = f"cores gave this process {min(share, 1):.0%} of their time, and the " * (device.type == "cpu")
    return (
        f"warning: this machine was busy, and times say little: the {given}rate of convolutions was between "
        f"{low / 1e9:.0f} and {high / 1e9:.0f} GFLOP/s"
    )


class Benchmark(Flags):
    __doc__ = (__doc__ or "").partition("No data")[0]

    only: list[str] = flag(PARTS, str, "parts to run", shown="all", nargs="+", choices=PARTS, action="extend")
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
    widths = {name: getattr(args, name) for name in WIDTHS}
    copies, _ = copy_bandwidth(device)
    bench = Bench(device, synthetic_images(963, device), widths, args.repeats, copies)
    for part in (part for part in PARTS if part in args.only):
        try_to_write(f"{time.perf_counter() - begin:5.0f} s  {part}\n", sys.stderr)
        (measure_meta_step if part in ORDERS else measure_meta_test)(bench, part)
    flops_per_second = median(flops for flops, _ in bench.rates)
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "convolution_flops_per_second": flops_per_second,
        "copy_bytes_per_second": copies,
        "paper_size": widths == WIDTHS,
        "busy": busy(bench.rates, device),
    }
    said = "{cpu}, {cores} cores, {threads} threads, device {device}, torch {torch}".format(**machine)
    say(f"{said}; {flops_per_second / 1e9:.0f} GFLOP/s, {copies / 1e9:.1f} GB/s\n")
    say(render(bench))
    if machine["busy"] is not None:
        say(f"\n{machine['busy']}")
    if args.json is not None:
        lines = {name: {"seconds": s, "ratios": bench.ratios(name)} for name, s in bench.times.items()}
        write_text(args.json, json.dumps({"machine": machine, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
