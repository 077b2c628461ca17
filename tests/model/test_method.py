"""The method against the plain float64 reference, on small networks and random images."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from datasets.task_sampler import sample_trajectory
from model.fast import BACKENDS
from model.meta_test import new_run
from model.modelfactory import Network, build, trained_parameters
from model.outer_loop import gather
from model.outer_loops import TrajectoryLoop
from model.scores import LOST, Draw, RateSearch, best_rate, next_tries
from tests import reference
from tests.conftest import pooled

NM, PLN, CLASSES = 5, 6, 12
WIDTHS = {
    "ANML": {"nm_channels": NM, "pln_channels": PLN, "num_classes": CLASSES},
    "sANML": {"pln_channels": PLN, "num_classes": CLASSES},
    "OML": {"pln_channels": PLN, "num_classes": CLASSES},
}
CPU = torch.device("cpu")


def assert_same(ours: object, theirs: object, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Equal but for rounding in float64."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def network(kind: str, backend: str = "plain") -> tuple[Network, list[Tensor]]:
    """A small float64 network, and its weights as a list for the reference. Norms and biases are not 1 and 0,
    so that a forgotten shift or scale shows, and some scales are negative."""
    generator = torch.Generator().manual_seed(0)
    net = build(kind, WIDTHS[kind], generator).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    BACKENDS[backend].prepare(net)
    return net, [parameter.detach().clone() for parameter in net.parameters()]


def images(*shape: int, seed: int = 1) -> Tensor:
    """Smooth grey images in about the released scale: [*shape, 1, 28, 28]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, 1, 7, 7, generator=generator, dtype=torch.float64)
    flat = noise.reshape(-1, 1, 7, 7)
    smooth = torch.nn.functional.interpolate(flat, size=28, mode="bicubic")
    return smooth.reshape(*shape, 1, 28, 28)


def grey(x: Tensor) -> Tensor:
    """The three equal channels that the published networks read."""
    return x.expand(*x.shape[:-3], 3, 28, 28)


def learner(net: Network, pixels: Tensor, steps: int | None = None, **options: Any) -> TrajectoryLoop:
    generator = torch.Generator().manual_seed(7)
    return TrajectoryLoop(
        net, pooled(pixels), generator, meta_lr=0.001, second_order_steps=steps, rln=7, **options
    )


@pytest.mark.parametrize("first_order", [True, False])
def test_meta_steps_with_adam(first_order: bool) -> None:
    """Two whole meta-steps, so that Adam's moments count; no reset, to share the reference's head."""
    net, weights = network("ANML")
    pixels = images(CLASSES, 20)
    ours = learner(net, pixels, 0 if first_order else None, reset=False)
    generator = torch.Generator().manual_seed(11)
    adam = reference.Adam(weights, 0.001)
    for _ in range(2):
        trajectory = sample_trajectory([20] * CLASSES, generator, update_step=4, remember=3)
        query, labels = gather(pooled(grey(pixels)), trajectory.query)
        _, slopes = reference.meta_gradient(weights, query, labels.tolist(), 4, 0.1, 7, not first_order)
        weights = adam.step(weights, slopes)
        ours.step(trajectory)
    for (name, parameter), theirs in zip(net.named_parameters(), weights, strict=True):
        if name in net.no_effect:  # no effect on the output: rounding of the reference, nothing here
            assert_same(parameter, theirs, rtol=0, atol=1e-7)
        else:
            assert_same(parameter, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reset", [True, False])
def test_reset_draws_the_rows_of_the_sampled_classes_only(reset: bool) -> None:
    net, _ = network("ANML")
    meta = learner(net, images(CLASSES, 20), reset=reset)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    meta.optimizer.lr = 0.0
    trajectory = sample_trajectory(
        [20] * CLASSES, torch.Generator().manual_seed(0), update_step=4, tasks=2, remember=3
    )
    meta.step(trajectory)
    for name, parameter in net.named_parameters():
        changed = (parameter != before[name]).reshape(len(parameter), -1).any(1).nonzero().flatten()
        expected = sorted(trajectory.classes) if reset and name == "head.weight" else []
        assert changed.tolist() == expected, name
    drawn = net.get_parameter("head.weight").detach()[trajectory.classes]
    assert 0.5 < float(drawn.std()) / (2 / drawn.shape[1]) ** 0.5 < 1.5


def test_a_reset_of_the_copy_comes_to_nothing_in_the_meta_weights() -> None:
    """But its gradient is that of a reset for good, and zero where no meta-weight had a part in the loss."""
    (copied, _), (reset, _) = network("ANML"), network("ANML")
    pixels = images(CLASSES, 20)
    ours, theirs = learner(copied, pixels, reset_copy=True), learner(reset, pixels)
    before = {name: p.detach().clone() for name, p in copied.named_parameters()}
    trajectories = [
        sample_trajectory([20] * CLASSES, torch.Generator().manual_seed(k), update_step=4, remember=3)
        for k in (0, 1)
    ]
    for meta in (ours, theirs):
        meta.differentiate(*trajectories)
    classes = [label for trajectory in trajectories for label in trajectory.classes]
    assert len(set(classes)) == 2
    for (name, parameter), grad, expected in zip(
        copied.named_parameters(), ours.grads, theirs.grads, strict=True
    ):
        assert torch.equal(parameter, before[name]), name
        if name == "head.weight":
            assert expected[classes].any()
            expected = expected.index_fill(0, torch.tensor(classes), 0)
        assert torch.equal(grad, expected), name


def test_a_run_starts_the_head_anew() -> None:
    net, _ = network("ANML")
    run = new_run(net, trained_parameters(net, 6), torch.Generator().manual_seed(0))
    assert torch.equal(run.get_parameter("nm.gate.weight"), net.get_parameter("nm.gate.weight"))
    assert not torch.equal(run.get_parameter("head.weight"), net.get_parameter("head.weight"))
    assert not run.get_parameter("head.bias").any()
    scratch = new_run(net, trained_parameters(net, 0), torch.Generator().manual_seed(0), reset_all=True)
    assert scratch.get_parameter("pln.block1.norm.weight").eq(1).all()
    name = "pln.block2.conv.weight"
    assert not torch.equal(scratch.get_parameter(name), net.get_parameter(name))


def searched(table: Mapping[float, Sequence[float]]) -> dict[Draw, dict[float, float]]:
    """Values of rates on draws, from those of each rate."""
    draws = zip(*table.values(), strict=True)
    return {Draw(0, k): dict(zip(table, values, strict=True)) for k, values in enumerate(draws)}


def test_best_rate_is_the_mode_of_the_winners() -> None:
    # 0.2 has the better mean, which decides where both win as often.
    assert best_rate(searched({0.1: (0.5, 0.5, 0.1), 0.2: (0.4, 0.4, 0.9), 0.3: (0.1, 0.1, 0.1)})) == 0.1
    assert best_rate(searched({0.1: (0.5, 0.1), 0.2: (0.4, 0.9), 0.3: (0.1, 0.1)})) == 0.2
    assert best_rate(searched({0.1: (0.5, 0.1), 0.2: (0.4, 0.9), 0.3: (0.4, 0.9)})) == 0.1
    assert best_rate(searched({0.003: (0.9, 0.9, 0.5), 0.001: (0.9, 0.9, 0.8)})) == 0.001
    assert best_rate(searched({0.003: (0.5,) * 3, 0.001: (0.5,) * 3})) == 0.001
    # 0.1 has 1/3 + 1/2 + 1 wins, 0.2 has 1/3 + 1/2, and 0.3 has 1/3 + 1/2 + 1/2.
    shared = {0.1: (0.5, 0.1, 0.5, 0.9), 0.2: (0.5, 0.5, 0.1, 0.1), 0.3: (0.5, 0.5, 0.5, 0.1)}
    assert best_rate(searched(shared)) == 0.1
    assert best_rate(searched({lr: values[:3] for lr, values in shared.items()})) == 0.3


RATES = (0.1, 0.2, 0.3, 0.4)
COARSE = ((LOST, 0.0, 0.5, 1.0), (LOST, 0.5), tuple(k / 10 for k in range(11)))


def test_a_search_that_stops_early_chooses_what_a_full_one_does() -> None:
    """Two class counts searched together, draws of two models, coarse values with ties and divergences."""
    for chance in map(random.Random, range(1000)):
        values, full = chance.choice(COARSE), chance.random() < 0.5
        draws = [Draw(k % 2, k // 2) for k in range(chance.randint(1, 7))]
        tables = {n: {d: {lr: chance.choice(values) for lr in RATES} for d in draws} for n in (5, 2)}
        rates, number = chance.sample(RATES, 4), chance.randint(1, 9)
        searches = {n: RateSearch(rates, sorted(draws), "test", full) for n in tables}
        made: set[tuple[Draw, float, int]] = set()
        while tries := next_tries(searches, number):
            undecided = [n for n in tables if not searches[n].decided]
            for draw, lr, counts in tries:
                assert counts
                assert set(counts) <= set(undecided)
                assert lr is not None
                assert (draw, lr, counts[-1]) not in made
                for n in counts:
                    made.add((draw, lr, n))
                    value = tables[n][draw][lr]
                    searches[n].scores[draw, lr] = {"test": abs(value), "diverged": int(value == LOST)}
        for n, table in tables.items():
            found = searches[n].best()
            assert found == best_rate(table)
            for other in RATES:  # which is nowhere worse and somewhere better
                assert all(v[other] == v[found] for v in table.values()) or any(
                    v[other] < v[found] for v in table.values()
                )
            assert not full or len(searches[n].scores) == 4 * len(draws)


def test_a_search_leaves_out_what_cannot_change_the_choice() -> None:
    """By hand: 0.1 wins four of five draws, which is certain after three."""
    table = searched({0.1: (0.9,) * 4 + (0.1,), 0.2: (0.5,) * 5, 0.3: (0.4,) * 5})
    search = RateSearch(list(RATES[:3]), list(table), "train")
    while tries := next_tries({10: search}):
        for draw, lr, _ in tries:
            assert lr is not None
            search.scores[draw, lr] = {"train": table[draw][lr], "diverged": 0}
    assert [draw.number for draw, _ in search.scores] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert search.best() == 0.1
