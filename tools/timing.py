"""Clocks that wait for the device, and how fast the machine is at what the networks are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)

CALLS = 3  # of which the median is taken: one that meets a busy machine does not count

CONVOLUTION = (84, 256, 13, 13)  # PLN's second convolution over a query, nearly all of a meta-step
MATRIX = 2048  # rows and columns
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


def median_seconds(work: Callable[[], object], device: torch.device, calls: int = CALLS) -> float:
    """Median time in s of `calls` calls, after one that is not counted."""
    work()
    return median(seconds(work, device) for _ in range(calls))


@torch.no_grad()
def convolution_rate(device: torch.device) -> float:
    """FLOP/s of a 3x3 convolution 256 -> 256 on [84, 256, 13, 13], forward, float32."""
    batch, channels, size, _ = CONVOLUTION
    x = torch.randn(CONVOLUTION, device=device)
    kernel = torch.randn(channels, channels, 3, 3, device=device)
    flops = 2 * batch * channels * channels * 9 * (size - 2) ** 2
    return flops / median_seconds(lambda: F.conv2d(x, kernel), device)


@torch.no_grad()
def matrix_rate(device: torch.device, size: int = MATRIX) -> float:
    """FLOP/s of the product of two square matrices, float32."""
    a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device)


@torch.no_grad()
def copy_bandwidth(device: torch.device, values: int = COPIED) -> float:
    """Bytes/s of copying a large float32 tensor, bytes read and bytes written both counted."""
    source, target = torch.ones(values, device=device), torch.empty(values, device=device)
    return 2 * 4 * values / median_seconds(lambda: target.copy_(source), device)
