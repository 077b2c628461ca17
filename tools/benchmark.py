"""Measure how fast this machine meta-trains and meta-tests, against the arithmetic and against a textbook.

    python -m tools.benchmark                                  # everything, at paper size, under 3 minutes
    python -m tools.benchmark --json benchmark.json            # and keep the numbers
    python -m tools.benchmark --only second-order anml-13      # some of it

No data is needed. What is measured, and how:

- meta-step: whole steps of `MetaLearner`, each between two measurements of the machine's convolution
  rate, so that a machine that slows down or is shared does not change the ratio: analytic FLOPs
  (`utils/flops.py`) / (time x convolution rate), the median over the steps.
- meta-test update: an `OnlineLearner` and the textbook loop in turn, on the same images; the ratio is
  textbook time / ours, the median over the turns. What the frozen layers put out is computed once per
  image, whatever the number of updates, and stands beside it.
- plain: the same with `--backend plain`, and how many times as long it takes as fast, in turn.
- textbook: `tests/reference.py` in float32, image by image, frozen layers recomputed, unfused.
- start: `mrcl_classification.py` as a process of its own on generated characters, second order, after
  a first run that fills the image cache. A step is done when its row is in the run folder's
  `metrics.csv`, which is looked at every few milliseconds; it began as long before as the row says.
  Peak memory is the process's largest resident set, as the system reports it at its end.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from datasets.characters import DRAWINGS, SIZE, CharacterSet
from model.episodes import sample_task, sample_trajectory
from model.fast import capture, learner, meta_loss, use_backend
from model.learner import Settings
from model.meta_learner import MetaLearner, gather
from model.meta_test import FrozenOutputs, learn, new_run
from model.modelfactory import ANML, build, constructor_arguments, trained_parameters
from tests import reference
from tools import flops
from tools.timing import (
    Spread,
    convolution_rate,
    copy_bandwidth,
    matrix_rate,
    seconds,
    spread,
)
from utils.arguments import (
    LEARNING_RATES,
    SCHEDULE,
    Parser,
    evaluation_parser,
    parse,
    training_parser,
)
from utils.device import choose_device
from utils.errors import UserError, run_script, say, try_to_write
from utils.files import check_writable, expand, write_text
from utils.run import cpu_name

ORDERS = {"first-order": True, "second-order": False}
TREATMENTS = {"anml-13": ("ANML", 13), "anml-7": ("ANML", 7), "anml-0": ("ANML", 0), "oml-6": ("OML", 6)}
PARTS = ("start", *ORDERS, *TREATMENTS)

WARM_UP = 2  # meta-steps before the first that counts: Adam's moments, the allocator, kernel choices
TEXTBOOK_STEPS = 2  # of the repeated meta-steps, those that the textbook's step is run beside
WIDTHS = {name: constructor_arguments(ANML)[name][1] for name in ("nm_channels", "pln_channels")}
TRAIN_IMAGES = 15  # of a class at meta-test
TURN_CLASSES = 1  # learned in one turn of ours, 15 images each
TURN_TEXTBOOK = 4  # updates in one turn of the textbook
PART_SECONDS = 20  # after which a part repeats no more: on a busy machine, fewer repeats in the same time
START_RUNS = 3  # processes, of which the median is taken
START_STEPS = 3  # of each process: its memory does not grow after the second
GIGA = 1e9


class Target(NamedTuple):
    """A line of the issue's table of targets: smaller is better where the aim is below the must."""

    key: str
    what: str
    must: float
    aim: float
    unit: str = ""

    def verdict(self, value: float) -> str:
        """Which of the two `value` reaches."""
        sign = 1 if self.aim > self.must else -1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "must reached" if sign * value >= sign * self.must else "missed"


TARGETS = (
    Target("first-order", "meta-step, first order: FLOPs / (time x convolution rate)", 0.55, 0.8),
    Target("second-order", "meta-step, second order: likewise", 0.40, 0.7),
    Target("anml-13", "meta-test update, ANML --rln 13: textbook / ours", 6, 10, "x"),
    Target("anml-0", "meta-test update, ANML --rln 0: textbook / ours", 1.5, 3, "x"),
    Target("start", "from command to first meta-step done, warm image cache", 5, 3, "s"),
    Target("memory", "peak memory, second order", 2, 1.2, "GiB"),
)


def arithmetic_ratio(operations: float, duration: float, rate: float) -> float:
    """How much of `duration` (s) the arithmetic needs at `rate` (FLOP/s): 1 is as fast as it allows."""
    return operations / (duration * rate)


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
    return CharacterSet("synthetic", pixels, (), "").normalised(device)


def repeats(most: int) -> Iterator[int]:
    """Count the repeats of a part: `most`, or as many as begin within `PART_SECONDS`, at least one."""
    begin = time.perf_counter()
    for k in range(most):
        if k and time.perf_counter() - begin > PART_SECONDS:
            return
        yield k


class Setup(NamedTuple):
    """What all measurements share."""

    device: torch.device
    images: Tensor
    widths: dict[str, int]
    repeats: int

    def network(self, kind: str) -> dict[str, int]:
        """The widths that a network of this kind has."""
        return self.widths if kind == "ANML" else {k: v for k, v in self.widths.items() if k != "nm_channels"}


def measure_machine(device: torch.device, repeats: int) -> dict[str, Any]:
    """Names, and rates in FLOP/s and bytes/s, each the median of `repeats` with its range."""
    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    rates = {
        "matrix_flops_per_second": matrix_rate,
        "convolution_flops_per_second": convolution_rate,
        "copy_bytes_per_second": copy_bandwidth,
    }
    return {**about, **{name: spread([rate(device) for _ in range(repeats)]) for name, rate in rates.items()}}


def measure_meta_step(setup: Setup, part: str) -> dict[str, Any]:
    """Meta-steps of ANML with the defaults of training, times in s; `part` is a key of `ORDERS`."""
    defaults = parse(training_parser(), [])
    generator = torch.Generator().manual_seed(0)

    def meta_learner(backend: str) -> MetaLearner:
        net = build("ANML", setup.network("ANML"), torch.Generator().manual_seed(0)).to(setup.device)
        used = use_backend(net, backend, setup.device)
        return MetaLearner(
            net,
            setup.images,
            generator,
            meta_lr=defaults.meta_lr,
            update_lr=defaults.update_lr,
            rln=defaults.rln,
            first_order=ORDERS[part],
            meta_loss=meta_loss(used),
            capture=capture(used),
        )

    fast_learner, plain_learner = meta_learner("fast"), meta_learner("plain")
    weights = [parameter.detach().clone() for parameter in plain_learner.net.parameters()]

    def step(learner: MetaLearner = fast_learner) -> None:
        learner.step(sample_trajectory(len(setup.images), DRAWINGS, generator))

    def textbook() -> None:
        trajectory = sample_trajectory(len(setup.images), DRAWINGS, generator)
        query, labels = gather(setup.images, trajectory.query)
        steps = len(trajectory.support)
        reference.meta_gradient(
            weights,
            query.expand(-1, 3, -1, -1).contiguous(),
            labels.tolist(),
            steps,
            defaults.update_lr,
            defaults.rln,
            second_order=not ORDERS[part],
        )

    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.device)
    for _ in range(WARM_UP):
        step()
    step(plain_learner)
    times, plain_times, rates = [], [], [convolution_rate(setup.device)]
    for _ in repeats(setup.repeats):
        times.append(seconds(step, setup.device))
        rates.append(convolution_rate(setup.device))
        plain_times.append(seconds(partial(step, plain_learner), setup.device))
    operations = flops.meta_step(
        second_order=not ORDERS[part],
        steps=defaults.update_step,
        remember=defaults.remember,
        **setup.widths,
    )
    around = [(before + after) / 2 for before, after in pairwise(rates)]
    ratios = [arithmetic_ratio(operations, t, rate) for t, rate in zip(times, around, strict=True)]
    device_peak = torch.cuda.max_memory_allocated(setup.device) if setup.device.type == "cuda" else None
    beside = [seconds(textbook, setup.device) for _ in repeats(min(TEXTBOOK_STEPS, setup.repeats))]
    return {
        "flops": operations,
        "seconds": spread(times),
        "convolution_flops_per_second": spread(rates),
        "ratio": spread(ratios),
        "plain_seconds": spread(plain_times),
        "plain_ratio": spread([b / a for a, b in zip(times, plain_times, strict=True)]),
        "textbook_seconds": spread(beside),
        "device_peak_bytes": device_peak,
    }


def measure_meta_test(setup: Setup, part: str) -> dict[str, Any]:
    """Meta-test updates, ours and the textbook's in turn, in s per update; `part` is of `TREATMENTS`."""
    kind, rln = TREATMENTS[part]
    generator = torch.Generator().manual_seed(0)
    classes = TURN_CLASSES * (setup.repeats + 1)
    pool = setup.images[:classes]
    task = sample_task(classes, DRAWINGS, classes, generator, train_images=TRAIN_IMAGES)
    weights, outputs, learners = [], {}, {}
    for backend in ("plain", "fast"):
        net = build(kind, setup.network(kind), torch.Generator().manual_seed(0)).to(setup.device)
        weights = [parameter.detach().clone() for parameter in net.parameters()]
        used = use_backend(net, backend, setup.device)
        trained = trained_parameters(net, rln)
        outputs[backend] = FrozenOutputs(net, pool, trained)
        run = new_run(net, trained, generator)
        learners[backend] = learner("adam", used)(run, trained, Settings(0.001))
    optimizer = reference.Adam(weights[2 * rln :], 0.001)

    def textbook(stream: Tensor) -> None:
        for index in stream:
            image, label = gather(pool, index)
            grey = image.expand(3, -1, -1).contiguous()
            weights[:] = reference.meta_test_update(weights, grey, int(label), rln, optimizer)

    def turn(index: Tensor) -> tuple[float, float, float, float]:
        """Seconds of the frozen layers per image, of a fast and a plain update and of the textbook's."""
        stream = index.reshape(-1, 2)
        few = stream[:TURN_TEXTBOOK]
        below = seconds(partial(outputs["fast"].get, stream), setup.device) / (len(index) * DRAWINGS)
        outputs["plain"].get(stream)
        fast, plain = (
            seconds(partial(learn, learners[backend], outputs[backend], stream), setup.device) / len(stream)
            for backend in ("fast", "plain")
        )
        return below, fast, plain, seconds(partial(textbook, few), setup.device) / len(few)

    warm_up, *turns = task.train.split(TURN_CLASSES)
    turn(warm_up)
    frozen, ours, plains, theirs = zip(*(turn(turns[k]) for k in repeats(setup.repeats)), strict=True)
    return {
        "seconds": spread(ours),
        "plain_seconds": spread(plains),
        "plain_ratio": spread([b / a for a, b in zip(ours, plains, strict=True)]),
        "textbook_seconds": spread(theirs),
        "ratio": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
        "frozen_seconds_per_image": spread(frozen) if rln else None,
    }


class Start(NamedTuple):
    """One training process: s from its command to its first step, begun and done; peak memory in bytes."""

    begun: float
    done: float
    peak: int


def first_row(metrics: Path) -> dict[str, str] | None:
    """The first row of a `metrics.csv`, or None as long as it is not there, whole."""
    try:
        lines = metrics.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    if len(lines) < 2 or not lines[1].endswith("\n"):
        return None
    return next(csv.DictReader(lines))


def start_training(flags: Sequence[str], folder: Path, steps: int) -> Start:
    """Run `mrcl_classification.py` on generated characters to its end, all its files in `folder`.

    Raises:
        UserError: the process fails; its own message is passed on.
    """
    runs = Path(tempfile.mkdtemp(dir=folder))
    script = Path(__file__).parents[1] / "mrcl_classification.py"
    command = [sys.executable, str(script), "--dataset=glyphs", f"--steps={steps}", "--name=start", *flags]
    command += [f"--runs_dir={runs}", f"--model_name={runs / 'start.net'}", f"--cache_dir={folder / 'cache'}"]
    metrics = runs / "start_0" / "metrics.csv"
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)  # noqa: S603 (ours)
        row, done, ended = None, 0.0, 0
        while not ended:
            time.sleep(0.005)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if row is None:
                row, done = first_row(metrics), time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or row is None:
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["no message"]
            raise UserError(f"{script.name} ended with exit code {process.returncode}: {said[-1]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB on Linux
    return Start(done - float(row["seconds"]), done, usage.ru_maxrss * unit)


def measure_start(flags: Sequence[str]) -> dict[str, Any]:
    """Start-up of training in s and its peak memory in bytes.

    To come before measurements that take memory: Linux counts what a process's parent holds when it
    starts it as the least that the process itself had.
    """
    with tempfile.TemporaryDirectory() as name:
        start_training(flags, Path(name), 1)  # draws the characters into the cache
        runs = [start_training(flags, Path(name), START_STEPS) for _ in repeats(START_RUNS)]
    return {
        "begun_seconds": spread([run.begun for run in runs]),
        "done_seconds": spread([run.done for run in runs]),
        "peak_bytes": spread([run.peak for run in runs]),
    }


def evaluation_updates() -> int:
    """Updates of a whole evaluation with default flags: the search of the rates and the runs reported."""
    defaults = evaluation_parser()
    sequences = len(LEARNING_RATES) * int(defaults.get_default("lr_search_runs"))
    sequences += int(defaults.get_default("runs"))
    return sequences * sum(SCHEDULE) * TRAIN_IMAGES


def extrapolate(results: dict[str, Any]) -> dict[str, float]:
    """Seconds of whole runs, from what was measured: learning alone, without reading data and tests."""
    steps = int(training_parser().get_default("steps"))
    totals = {}
    for part in ORDERS:
        if part in results:
            name = f"{steps:,} meta-steps, {part.replace('-', ' ')}"
            totals[name] = steps * results[part]["seconds"].median
    updates = evaluation_updates()
    for part in ("anml-13", "anml-0"):
        if part in results:
            name = f"evaluation, {updates:,} updates, {called(part)}"
            totals[name] = updates * results[part]["seconds"].median
    return totals


def compare(results: dict[str, Any]) -> dict[str, Any]:
    """The targets whose parts were measured, each with the value found here and what it reaches."""
    here = {part: results[part]["ratio"].median for part in (*ORDERS, *TREATMENTS) if part in results}
    if "start" in results:
        here["start"] = results["start"]["done_seconds"].median
        here["memory"] = results["start"]["peak_bytes"].median / 2**30
    return {
        target.key: {
            **target._asdict(),
            "here": here[target.key],
            "verdict": target.verdict(here[target.key]),
        }
        for target in TARGETS
        if target.key in here
    }


def called(part: str) -> str:
    """How the tables call a part."""
    if part in TREATMENTS:
        return "{} --rln {}".format(*TREATMENTS[part])
    return part.replace("-", " ")


def shown(values: Spread, scale: float = 1, digits: int = 2) -> list[str]:
    """Two cells, median and range (how many), in units of 1 / `scale`."""
    middle, low, high = (f"{scale * value:.{digits}f}" for value in values[:3])
    return [middle, f"{low} - {high} ({values.number})"]


def render(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(padded).rstrip()

    return "\n".join([title, line(lines[0]), line(["-" * width for width in widths]), *map(line, lines[1:])])


def machine_table(machine: dict[str, Any]) -> str:
    """What `measure_machine` found."""
    rows = [
        ["matrix product, GFLOP/s", *shown(machine["matrix_flops_per_second"], 1 / GIGA, 0)],
        ["convolution, GFLOP/s", *shown(machine["convolution_flops_per_second"], 1 / GIGA, 0)],
        ["copy, GB/s read and written", *shown(machine["copy_bytes_per_second"], 1 / GIGA, 1)],
    ]
    return render("Machine, float32", ["", "median", "range (n)"], rows)


def meta_step_table(results: dict[str, Any]) -> str:
    """What `measure_meta_step` found, a line for each order measured."""
    header = ["ANML", "s", "range (n)", "GFLOP", "conv GFLOP/s", "ratio", "range (n)"]
    header += ["plain s", "plain / fast", "textbook s"]
    rows = []
    for part in ORDERS:
        if part not in results:
            continue
        found = results[part]
        rate, *_ = shown(found["convolution_flops_per_second"], 1 / GIGA, 0)
        textbook, *_ = shown(found["textbook_seconds"])
        times, ratios = shown(found["seconds"], 1, 3), shown(found["ratio"])
        plain, *_ = shown(found["plain_seconds"], 1, 3)
        times_slower, *_ = shown(found["plain_ratio"])
        row = [called(part), *times, f"{found['flops'] / GIGA:.1f}", rate, *ratios]
        rows.append([*row, plain, times_slower, textbook])
    return render("Meta-step; ratio = GFLOP / (s x conv GFLOP/s)", header, rows)


def meta_test_table(results: dict[str, Any]) -> str:
    """What `measure_meta_test` found, a line for each treatment measured."""
    header = [
        "",
        "ms",
        "range (n)",
        "1/s",
        "textbook ms",
        "ratio",
        "range (n)",
        "plain ms",
        "plain / fast",
        "frozen layers, ms once per image",
    ]
    rows = []
    for part in TREATMENTS:
        if part not in results:
            continue
        found = results[part]
        once = found["frozen_seconds_per_image"]
        below = "-" if once is None else shown(once, 1e3)[0]
        times, rate = shown(found["seconds"], 1e3), f"{1 / found['seconds'].median:.0f}"
        textbook, *_ = shown(found["textbook_seconds"], 1e3)
        plain, *_ = shown(found["plain_seconds"], 1e3)
        times_slower, *_ = shown(found["plain_ratio"])
        row = [called(part), *times, rate, textbook, *shown(found["ratio"], 1, 1)]
        rows.append([*row, plain, times_slower, below])
    return render("Meta-test update, batch 1; ratio = textbook / ours", header, rows)


def start_table(start: dict[str, Any]) -> str:
    """What `measure_start` found."""
    rows = [
        ["command to first meta-step begun, s", *shown(start["begun_seconds"])],
        ["command to first meta-step done, s", *shown(start["done_seconds"])],
        ["peak memory, MiB", *shown(start["peak_bytes"], 2**-20, 0)],
    ]
    return render("Training process, second order, warm image cache", ["", "median", "range (n)"], rows)


def extrapolated_table(totals: dict[str, float]) -> str:
    """Whole runs, of `extrapolate`."""
    rows = [[name, f"{total / 3600:.1f}"] for name, total in totals.items()]
    return render("Extrapolated: learning alone, without reading data and tests", ["", "hours"], rows)


def targets_table(targets: dict[str, Any], paper_size: bool) -> str:
    """What `compare` made of the targets."""
    rows = []
    for line in targets.values():
        what = f"{line['what']}, {line['unit']}" if line["unit"] else line["what"]
        rows.append([what, f"{line['here']:.2f}", f"{line['must']:g}", f"{line['aim']:g}", line["verdict"]])
    note = "" if paper_size else "; they are for paper size, which this is not"
    return render(f"Targets{note}", ["", "here", "must", "aim", ""], rows)


def tables(results: dict[str, Any]) -> Iterator[str]:
    """What was measured, table by table."""
    machine = results["machine"]
    yield (
        "{cpu}, {cores} cores, {threads} threads, device {device}, torch {torch}; "
        "load before the start {load:.1f}".format(**machine)
    )
    yield machine_table(machine)
    if results.keys() & ORDERS.keys():
        yield meta_step_table(results)
    if results.keys() & TREATMENTS.keys():
        yield meta_test_table(results)
    if "start" in results:
        yield start_table(results["start"])
    if results["extrapolated_seconds"]:
        yield extrapolated_table(results["extrapolated_seconds"])
    if results["targets"]:
        yield targets_table(results["targets"], results["paper_size"])


def plain(value: Any) -> Any:
    """`value` with names in place of the positions of its named tuples, for JSON."""
    if isinstance(value, Spread):
        return value._asdict()
    return {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def positive(text: str) -> int:
    """A whole number of 1 or more from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def benchmark_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(
        "Time meta-training and meta-test against the arithmetic and a textbook.", lambda *_: None
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.flag(group, "--repeats", positive, 7, "repeated measurements, of which the median is shown")
    parser.flag(group, "--nm_channels", positive, WIDTHS["nm_channels"], "channels of NM")
    parser.flag(group, "--pln_channels", positive, WIDTHS["pln_channels"], "channels of the PLN, and of OML")
    group = parser.add_argument_group("run")
    group.add_argument("--json", type=expand, metavar="FILE", help="write the numbers here as well")
    parser.flag(group, "--device", str.lower, "auto", "where", choices=("auto", "cpu", "cuda", "mps"))
    parser.flag(group, "--threads", positive, None, "CPU threads", shown="torch's choice")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, by part, with what follows from it."""
    device = choose_device(args.device, args.threads)
    widths = {"nm_channels": args.nm_channels, "pln_channels": args.pln_channels}
    results: dict[str, Any] = {"paper_size": widths == WIDTHS}
    load = os.getloadavg()[0]  # by others, as long as this has not begun
    begin = time.perf_counter()

    def note(what: str) -> None:
        try_to_write(f"{time.perf_counter() - begin:5.0f} s  {what}\n", sys.stderr)

    if "start" in args.only:
        note("start of training")
        flags = [f"--device={args.device}", *(f"--{name}={width}" for name, width in widths.items())]
        results["start"] = measure_start([*flags, *([f"--threads={args.threads}"] if args.threads else [])])
    note("machine")
    results["machine"] = {**measure_machine(device, args.repeats), "load": load}
    setup = Setup(device, synthetic_images(963, device), widths, args.repeats)
    for parts, measurement in ((ORDERS, measure_meta_step), (TREATMENTS, measure_meta_test)):
        for part in parts:
            if part in args.only:
                note(called(part))
                results[part] = measurement(setup, part)
    results["extrapolated_seconds"] = extrapolate(results)
    results["targets"] = compare(results)
    results["seconds"] = time.perf_counter() - begin
    note("done")
    return results


def main() -> None:
    args = benchmark_parser().read(sys.argv[1:])
    if args.json is not None:
        check_writable(args.json, "--json")
    results = measure(args)
    say("\n\n".join(tables(results)))
    if args.json is not None:
        write_text(args.json, json.dumps(plain(results), indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
