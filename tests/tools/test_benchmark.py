"""The benchmark: its count of the arithmetic, its warning, and a run of it at tiny widths."""

from pathlib import Path

import pytest
import torch

from datasets import glyphs
from tests.conftest import ROOT, Call, drawn_once
from tools import benchmark
from utils.command_line import parse

NM, PLN = 4, 6  # channels
FLAGS = [f"--nm_channels={NM}", f"--pln_channels={PLN}", "--repeats=2", "--only"]


def arithmetic(second_order: bool) -> int:
    """FLOPs of a meta-step of ANML with `--rln 7`, by hand: what plain autograd computes.

    Two for each multiply-add of convolutions and linear layers, of three input channels. A layer y = W x
    has one product forward; backward dW = dy x' and dx = W' dy, the second of which nobody asks for where
    x is the image. Where an inner step is differentiated, each of the three has two gradients; of these
    six, a layer that reads the image has three.
    """

    def trunk(channels: int) -> list[int]:
        inputs, positions = (3, channels, channels), (26 * 26, 11 * 11, 3 * 3)
        return [9 * a * channels * b for a, b in zip(inputs, positions, strict=True)]

    nm, pln = [*trunk(NM), 9 * NM * 9 * PLN], [*trunk(PLN), 9 * PLN * 1000]
    steps, query = 20, 84
    products = query * (3 * sum(nm) - nm[0]) + (steps + query) * (3 * sum(pln) - pln[0])
    return 2 * (products + second_order * steps * (6 * sum(pln) - 3 * pln[0]))


def test_the_whole_at_tiny_widths(call: Call, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "load", lambda split, *_: drawn_once(split, ROOT, cache, 28))
    monkeypatch.setattr(benchmark, "convolution_rate", lambda _: (1e9, 0.5))
    monkeypatch.setattr(benchmark, "PART_SECONDS", -1)  # as after a slow first turn
    args = parse(benchmark.Benchmark, [*FLAGS, "first-order", "second-order", "anml-13", "anml-0", "oml-6"])
    times, rates = benchmark.measure(args, torch.device("cpu"), copies=1e15)
    assert rates == [(1e9, 0.5)] * 5
    assert "ANML --rln 7, update" not in times
    shown = benchmark.render(times)
    for name, of in times.items():
        assert f"{name}  " in shown
        assert all(len(turns) == 1 and turns[0] > 0 for turns in of.values())
    for order in ("first order", "second order"):
        (machine,) = times[f"meta-step, {order}"]["machine"]
        assert machine * 1e9 == pytest.approx(arithmetic(order == "second order"))
    # The head alone: forward, and backward to its weights and, with a gate before it, to no input.
    (head,) = times["ANML --rln 13, update"]["machine"]
    assert head * 1e9 == pytest.approx(2 * 2 * 9 * PLN * 1000, rel=1e-3)
    row = benchmark.render({"x": {"fast": [1, 2], "machine": [3, 8]}}).split()
    assert row[-4:] == ["5500", "-", "-", "3.50"]
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda _: 1e15)
    done = call(benchmark, *FLAGS, "anml-13", "--device=cpu")
    assert "1 GFLOP/s, 1000000.0 GB/s" in done.stdout
    assert "warning: this machine was busy" in done.stdout
