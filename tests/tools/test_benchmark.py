"""The benchmark: its count of the arithmetic, its warning, and a run of it at tiny widths."""

import json
import sys
from pathlib import Path

import pytest

from tools import benchmark

NM, PLN = 4, 6  # channels


def arithmetic(second_order: bool) -> int:
    """FLOPs of a meta-step of ANML with `--rln 7`, by hand: what is asked for, whatever code computes it.

    Two for each multiply-add of convolutions and linear layers, of three input channels. A layer y = W x
    has one product forward; backward dW = dy x' and dx = W' dy, the second of which nobody asks for where
    x is the image. Where an inner step is differentiated, each of the three has two gradients; of these
    six, a layer that reads the image keeps two.
    """

    def trunk(channels: int) -> list[int]:
        inputs, positions = (3, channels, channels), (26 * 26, 11 * 11, 3 * 3)
        return [9 * a * channels * b for a, b in zip(inputs, positions, strict=True)]

    nm, pln = [*trunk(NM), 9 * NM * 9 * PLN], [*trunk(PLN), 9 * PLN * 1000]
    steps, query = 20, 84
    products = query * (3 * sum(nm) - nm[0]) + (steps + query) * (3 * sum(pln) - pln[0])
    return 2 * (products + second_order * steps * (6 * sum(pln) - 4 * pln[0]))


def test_the_whole_at_tiny_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "benchmark.json"
    parts = ["first-order", "second-order", "anml-13", "anml-0", "oml-6"]
    flags = [f"--nm_channels={NM}", f"--pln_channels={PLN}", "--repeats=2", "--device=cpu", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, "--only", *parts])
    monkeypatch.setattr(benchmark, "convolution_rate", lambda _: (1e9, 0.5))
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda _: 1e15)
    monkeypatch.setattr(benchmark, "PART_SECONDS", -1)  # as after a slow first turn
    benchmark.main()
    shown = capsys.readouterr().out
    assert "warning: this machine was busy" in shown
    assert "ANML --rln 7" not in shown
    lines = json.loads(path.read_text())["lines"]
    for name, line in lines.items():
        assert f"{name}  " in shown
        assert set(line["seconds"]) == set(line["ratios"])
        for column, (value,) in line["seconds"].items():  # of one turn
            assert value > 0
            assert line["ratios"][column] == pytest.approx(value / line["seconds"]["fast"][0])
    for order in ("first order", "second order"):
        (machine,) = lines[f"meta-step, {order}"]["seconds"]["machine"]
        assert machine * 1e9 == pytest.approx(arithmetic(order == "second order"))
    # The head alone: forward, and backward to its weights and, with a gate before it, to no input.
    (head,) = lines["ANML --rln 13, update"]["seconds"]["machine"]
    assert head * 1e9 == pytest.approx(2 * 2 * 9 * PLN * 1000, rel=1e-3)
