"""Clocks that wait for the device, and how fast the machine is at what the networks are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)

CALLS = 3  # of which the median is taken
CONVOLUTION = (84, 256, 13, 13)  # PLN's second convolution over a query, nearly all of a meta-step
COPIED = 64 * 2**20  # float32 values, far more than a cache holds


class Spread(NamedTuple):
    """Median and range of repeated measurements, in their unit, and how many there were."""

    median: float
    low: float
    high: float
    number: int


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of `values`, and their number."""
    return Spread(median(values), min(values), max(values), len(values))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was asked for (the CPU always has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time in s that `work` takes on `device`, its kernels included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


class Rate(NamedTuple):
    """What the machine does in a second, and the part of its threads' time that it gave to this process.

    On a quiet CPU `share` is nearly 1. It is less where other processes, other virtual machines or a quota
    of the container take the cores. Of a GPU it says nothing.
    """

    per_second: float
    share: float


def rate(amount: float, work: Callable[[], object], device: torch.device) -> Rate:
    """The rate of `work`, which does `amount` of something: the median of calls, after one not counted."""
    work()
    cpu, start = time.process_time(), time.perf_counter()
    times = [seconds(work, device) for _ in range(CALLS)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return Rate(amount / median(times), cpu / wall / torch.get_num_threads())


@torch.no_grad()
def convolution_rate(device: torch.device) -> Rate:
    """FLOP/s of a 3x3 convolution 256 -> 256 on [84, 256, 13, 13], forward, float32."""
    batch, channels, size, _ = CONVOLUTION
    x = torch.ones(CONVOLUTION, device=device)
    kernel = torch.ones(channels, channels, 3, 3, device=device)
    flops = 2 * batch * channels * channels * 9 * (size - 2) ** 2
    return rate(flops, lambda: F.conv2d(x, kernel), device)


@torch.no_grad()
def copy_bandwidth(device: torch.device, values: int = COPIED) -> Rate:
    """Bytes/s of copying a large float32 tensor, bytes read and bytes written both counted."""
    source, target = torch.ones(values, device=device), torch.empty(values, device=device)
    return rate(2 * 4 * values, lambda: target.copy_(source), device)
