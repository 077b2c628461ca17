"""The benchmark: its count of the arithmetic, its estimates, its warning, and a run of it at tiny widths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tools import benchmark
from tools.timing import Rate

CPU = torch.device("cpu")
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


def test_evaluations_by_hand() -> None:
    """Of 18 rates on 10 draws and 10 runs; 9 class counts sum up to 2,235, the largest is 600."""
    apart, together = 2_235, 600
    for nested, decided, learned, passes in (
        (False, False, 190 * apart, 190),
        (False, True, (18 * 6 + 10) * apart, 118),
        (True, False, 180 * together + 10 * apart, 190),
        (True, True, (18 * 6 + 10) * together, 118),
    ):
        assert benchmark.evaluation_images(nested=nested, decided=decided) == (
            15 * learned,
            20 * passes * apart,
        )


def test_synthetic_images_are_mostly_paper() -> None:
    images = benchmark.synthetic_images(30, CPU)
    assert images.shape == (30, 20, 1, 28, 28)
    paper = (images == images.max()).double().mean().item()
    assert 0.6 < paper < 0.95


@pytest.mark.parametrize(
    ("rates", "device", "said"),
    [
        ([Rate(9e10, 0.99), Rate(1e11, 0.92), Rate(1e11, 0.4)], "cpu", None),
        ([Rate(1e11, 0.5)] * 3, "cpu", "gave this process 50% of their time"),
        (
            [Rate(7e10, 1.01), Rate(1e11, 1.01)],
            "cpu",
            "100% of their time, and the rate of convolutions was between 70 and 100",
        ),
        ([Rate(1e13, 0.05)] * 3, "cuda", None),
        (
            [Rate(7e12, 0.05), Rate(1e13, 0.05)],
            "cuda",
            "little: the rate of convolutions was between 7000 and 10000",
        ),
    ],
)
def test_a_busy_machine_is_said(rates: list[Rate], device: str, said: str | None) -> None:
    found = benchmark.busy(rates, torch.device(device))
    assert found is None if said is None else found is not None and said in found


def test_the_whole_at_tiny_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "benchmark.json"
    parts = ["first-order", "second-order", "anml-13", "anml-0", "oml-6"]
    flags = [f"--nm_channels={NM}", f"--pln_channels={PLN}", "--repeats=2", "--device=cpu", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, "--only", *parts])
    monkeypatch.setattr(benchmark, "convolution_rate", lambda _: Rate(1e9, 0.5))
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda _: Rate(1e15, 0.5))
    monkeypatch.setattr(benchmark, "PART_SECONDS", -1)  # as after a slow first turn
    benchmark.main()
    shown = capsys.readouterr().out
    assert "warning: this machine was busy" in shown
    assert "ANML --rln 7" not in shown
    lines = json.loads(path.read_text())["lines"]
    for name, line in lines.items():
        assert f"\n{name}, " in shown
        for column in set(line["ratios"]):
            assert 0 < line[column]["low"] <= line[column]["median"] <= line[column]["high"]
            assert line[column]["number"] <= 1
            assert line["ratios"][column] == pytest.approx(line[column]["median"] / line["fast"]["median"])
    for order in ("first order", "second order"):
        machine = lines[f"meta-step, {order}"]["machine"]["median"]
        assert machine * 1e9 == pytest.approx(arithmetic(order == "second order"))
        assert lines[f"train command, {order}"]["machine"]["median"] == pytest.approx(20_000 * machine)
    # The head alone: forward, and backward to its weights and, with a gate before it, to no input.
    head = lines["ANML --rln 13, update"]["machine"]["median"]
    assert head * 1e9 == pytest.approx(2 * 2 * 9 * PLN * 1000, rel=1e-3)
    assert lines["evaluate command, --rln 0"]["fast"]["median"] == pytest.approx(
        190
        * 2_235
        * sum(
            n * lines[f"ANML --rln 0, {what}"]["fast"]["median"] for n, what in ((15, "update"), (20, "test"))
        )
    )


def test_wrong_flags_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--repeats", "0"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "--repeats" in message
    assert message.count("\n") == 1
