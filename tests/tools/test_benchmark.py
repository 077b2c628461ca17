"""The benchmark: its count of the arithmetic against torch's, its ratios, and a run of it at tiny widths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests import reference
from tools import benchmark, flops
from tools.timing import convolution_rate, copy_bandwidth, matrix_rate, spread
from utils.errors import UserError

TINY = ["--nm_channels=4", "--pln_channels=6"]


def test_products_by_hand() -> None:
    # Kernel 3x3; 3, 2 and 2 inputs; 2 outputs; 26x26, 11x11 and 3x3 positions.
    convolutions = [9 * 3 * 2 * 676, 9 * 2 * 2 * 121, 9 * 2 * 2 * 9]
    assert flops.trunk_products(2) == convolutions == [36_504, 4_356, 324]
    assert flops.nm_products(2, 5) == [*convolutions, 18 * 45]
    assert flops.pln_products(2, 10) == [*convolutions, 18 * 10]


def test_passes_by_hand() -> None:
    assert flops.forward([5, 7]) == 2 * (5 + 7)
    assert flops.backward([5, 7]) == 2 * (5 + 2 * 7)
    assert flops.double_backward([5, 7]) == 2 * (2 * 5 + 6 * 7)


def test_a_meta_step_of_the_paper() -> None:
    assert flops.meta_step(second_order=False) == 60_482_294_784
    assert flops.meta_step(second_order=True) == 79_811_564_544


def plain_meta_step(
    weights: list[Tensor], query: Tensor, labels: Tensor, steps: int, second_order: bool
) -> None:
    """A meta-step of ANML in the phases that are counted, without thought for speed."""
    initial = [weight.float().requires_grad_() for weight in weights]
    gates = torch.sigmoid(F.linear(reference.trunk(initial[:12], query), initial[12], initial[13]))

    def loss(pln: list[Tensor], rows: slice) -> Tensor:
        features = reference.trunk(pln[:12], query[rows]) * gates[rows]
        return F.cross_entropy(F.linear(features, pln[12], pln[13]), labels[rows])

    fast = initial[14:]
    for t in range(len(query) - steps, len(query)):
        inner = loss(fast, slice(t, t + 1))
        slopes = torch.autograd.grad(inner, fast, create_graph=second_order, retain_graph=True)
        fast = [weight - 0.1 * slope for weight, slope in zip(fast, slopes, strict=True)]
    torch.autograd.grad(loss(fast, slice(None)), initial)


@pytest.mark.parametrize("second_order", [False, True])
def test_torch_counts_the_same(second_order: bool) -> None:
    nm, pln, classes, steps, remember = 4, 6, 10, 3, 5
    generator = torch.Generator().manual_seed(0)
    weights = reference.fresh_weights("ANML", generator, nm, pln, classes)
    query = torch.randn(remember + steps, 3, 28, 28, generator=generator)
    labels = torch.arange(remember + steps)
    with FlopCounterMode(display=False) as counter:
        plain_meta_step(weights, query, labels, steps, second_order)
    counted = flops.meta_step(
        second_order=second_order,
        steps=steps,
        remember=remember,
        nm_channels=nm,
        pln_channels=pln,
        num_classes=classes,
    )
    if second_order:
        # torch differentiates the inner steps with respect to the image as well, wanted or not.
        counted += steps * flops.forward(flops.trunk_products(pln)[:1])
    assert counter.get_total_flops() == counted


def test_arithmetic_ratio() -> None:
    assert benchmark.arithmetic_ratio(60e9, 0.4, 300e9) == pytest.approx(0.5)


def test_spread() -> None:
    assert spread([3.0, 1.0, 8.0]) == (3.0, 1.0, 8.0, 3)


@pytest.mark.parametrize(
    ("must", "aim", "value", "verdict"),
    [
        (0.4, 0.7, 0.7, "aim reached"),
        (0.4, 0.7, 0.69, "must reached"),
        (0.4, 0.7, 0.39, "missed"),
        (5, 3, 2.9, "aim reached"),
        (5, 3, 5, "must reached"),
        (5, 3, 5.1, "missed"),
    ],
)
def test_verdict(must: float, aim: float, value: float, verdict: str) -> None:
    assert benchmark.Target("", "", must, aim).verdict(value) == verdict


def test_updates_of_an_evaluation() -> None:
    # 18 rates x 10 draws and 10 runs; 2,235 classes over the schedule; 15 images each.
    assert benchmark.evaluation_updates() == (18 * 10 + 10) * 2_235 * 15


def test_synthetic_images_are_mostly_paper() -> None:
    images = benchmark.synthetic_images(30, torch.device("cpu"))
    assert images.shape == (30, 20, 1, 28, 28)
    paper = (images == images.max()).double().mean().item()
    assert 0.6 < paper < 0.95


def test_rates_are_positive() -> None:
    device = torch.device("cpu")
    assert convolution_rate(device) > 0
    assert matrix_rate(device, size=64) > 0
    assert copy_bandwidth(device, values=1000) > 0


def test_a_busy_machine_gets_fewer_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(benchmark.repeats(3)) == [0, 1, 2]
    monkeypatch.setattr(benchmark, "PART_SECONDS", -1)
    assert list(benchmark.repeats(3)) == [0]


def test_first_row_waits_for_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert benchmark.first_row(path) is None
    for part in ("step,sec", "onds\n", "1,0.2"):
        with path.open("a") as file:
            file.write(part)
        assert benchmark.first_row(path) is None
    with path.open("a") as file:
        file.write("5\n2,")
    assert benchmark.first_row(path) == {"step": "1", "seconds": "0.25"}


def test_start_of_training(tmp_path: Path) -> None:
    start = benchmark.start_training([*TINY, "--device=cpu", "--threads=1"], tmp_path, steps=1)
    assert 0 < start.begun < start.done
    assert 2**26 < start.peak < 2**33


def test_a_training_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # the command that does nothing but fail
    with pytest.raises(UserError, match=r"mrcl_classification\.py ended with exit code 1: no message"):
        benchmark.start_training([], tmp_path, steps=1)


def test_the_whole_at_tiny_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "benchmark.json"
    parts = ["first-order", "second-order", "anml-13", "anml-0", "oml-6"]
    flags = [*TINY, "--repeats=1", "--device=cpu", f"--json={path}", "--only", *parts]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    benchmark.main()
    shown = capsys.readouterr().out
    for title in ("Machine", "Meta-step", "Meta-test update", "Extrapolated", "Targets"):
        assert f"\n{title}" in shown
    assert "ANML --rln 7" not in shown
    found = json.loads(path.read_text())
    for part in parts:
        assert found[part]["ratio"]["median"] > 0
    assert found["anml-0"]["frozen_seconds_per_image"] is None
    first = found["first-order"]
    assert first["flops"] == flops.meta_step(second_order=False, nm_channels=4, pln_channels=6)
    assert first["seconds"]["low"] <= first["seconds"]["median"] <= first["seconds"]["high"]
    assert found["extrapolated_seconds"]["20,000 meta-steps, first order"] == pytest.approx(
        20_000 * first["seconds"]["median"]
    )
    assert set(found["targets"]) == {"first-order", "second-order", "anml-13", "anml-0"}


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
