"""Heads that need no gradient: their numbers against plain formulas, the scripts with them, a user's own."""

import runpy
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from evaluation.results import read_results, table
from model.learner import LEARNERS, Given, NearestClassMean, Prior, fit_prior, inverse_gamma, view
from model.meta_test import MetaTest
from model.modelfactory import build
from tests.conftest import Evaluate, pooled, shown
from tests.reference import log_density
from utils.errors import UserError

CLASSES = 6
WIDTHS = {"nm_channels": 2, "pln_channels": 2, "num_classes": 20}
TINY = "--dataset glyphs --test_classes 10 --threads 1 --name e --backend plain"


def direct(name: str, train: Tensor, shrinkage: float, prior: Prior) -> Callable[[Tensor], Tensor]:
    """Scores as in the books, from all features [C, K, F] at once, up to a number for each image."""
    means, deviations = train.mean(1), train - train.mean(1, keepdim=True)
    if name == "slda":
        flat, s = deviations.flatten(0, 1), shrinkage
        within = flat.t() @ flat / len(flat)
        identity = torch.eye(len(within), dtype=within.dtype)
        inverse = torch.linalg.inv((1 - s) * within + s * within.diag().mean() * identity)
        return lambda x: -torch.einsum("bcf,fg,bcg->bc", x[:, None] - means, inverse, x[:, None] - means) / 2
    if name != "ncm":
        return lambda x: torch.stack(
            [torch.stack([log_density(name, q, k, prior) for k in train]) for q in x]
        )
    return lambda x: -(x[:, None] - means).square().sum(2)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize(
    ("name", "features"), [("ncm", "gated"), ("map", "gate"), ("predictive", "gated"), ("slda", "both")]
)
def test_sums_in_any_order_give_the_plain_formula(name: str, features: Any, power: float) -> None:
    generator = torch.Generator().manual_seed(0)
    net = build("ANML", WIDTHS, generator).double().eval()
    pool = torch.randn(CLASSES, 20, 1, 28, 28, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"features": features, "power": power}
    with torch.no_grad():
        gate, gated = net.gate(pool.flatten(0, 1)), net.features(pool.flatten(0, 1))
    assert gate is not None
    parts = {"gated": [gated], "gate": [gate], "both": [gated, gate]}[features]
    if power != 1:
        parts = [part.sqrt() / part.sqrt().norm(dim=1, keepdim=True) for part in parts]
    seen = torch.cat(parts, 1).unflatten(0, (CLASSES, 20))
    torch.testing.assert_close(view(net, pool.flatten(0, 1), **options), seen.flatten(0, 1))

    prior = fit_prior(net, iter(pool), **options)
    # No shape and scale are more likely.
    likely = stats.invgamma.fit(seen.var(1).mean(1).numpy(), floc=0)
    assert prior == pytest.approx((likely[0], likely[2]), rel=1e-3)
    options |= {"shrinkage": 0.3} if name == "slda" else {}

    index = torch.cartesian_prod(torch.arange(CLASSES), torch.arange(15))
    test = seen[:, 15:].flatten(0, 1)
    expected = direct(name, seen[:, :15], 0.3, prior)(test)
    expected = expected - expected[:, :1]
    for order in (torch.arange(len(index)), torch.randperm(len(index), generator=generator)):
        for size in (1, 7, len(index)):
            learner = LEARNERS[name](net, [], Given(prior=prior), **options)
            assert isinstance(learner, NearestClassMean)
            held = []
            for rows in order.split(size):
                labels, drawings = index[rows].unbind(1)
                learner.learn(pool[labels, drawings], labels)
                tensors = [v for v in vars(learner).values() if isinstance(v, Tensor)]
                held.append(sum(v.numel() for v in (*tensors, *learner.sums.values())))
            assert size > 1 or max(held[CLASSES * 14 :]) == held[-1] <= 2 * CLASSES * 36 + 36**2
            scores = learner.solve()(test)
            torch.testing.assert_close(scores - scores[:, :1], expected, rtol=1e-8, atol=1e-8)
            given = learner.predict(pool[:, 15:].flatten(0, 1))
            assert given.tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize(("shape", "scale"), [(0.5, 1.0), (3.0, 200.0), (60.0, 0.002)])
def test_the_prior_is_the_most_likely_one(shape: float, scale: float) -> None:
    values = stats.invgamma.rvs(shape, scale=scale, size=20_000, random_state=1)
    likely = stats.invgamma.fit(values, floc=0)
    found = inverse_gamma(torch.from_numpy(values))
    assert found == pytest.approx((likely[0], likely[2]), rel=1e-4)
    # Classes of copies of one image, up to rounding, say nothing of others.
    assert inverse_gamma(torch.from_numpy(np.append(values, [0, 1e-20]))) == found


def test_the_prior_of_equal_values_is_finite_and_has_their_mean() -> None:
    shape, scale = inverse_gamma(torch.full((4,), 0.3, dtype=torch.float64))
    assert scale / (shape - 1) == pytest.approx(0.3)


def test_what_is_not_finite_is_no_class() -> None:
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    pool = torch.zeros(CLASSES, 20, 1, 28, 28)
    for name, (fill, diverged) in product(("ncm", "map", "predictive", "slda"), ((0.0, 0), (torch.nan, 1))):
        options: dict[str, Any] = {"kind": LEARNERS[name], "options": {"power": 1.0}}
        tester = MetaTest(net, pooled(pool + fill), 13, seed=0, **options, background=pooled(pool))
        assert tester.score(3, None, "report", 0)["diverged"] == diverged


@pytest.mark.parametrize(
    ("flags", "treatment"),
    [
        ("--model ANML.net --learner slda --features gated", "ANML, streaming LDA --features gated"),
        ("--model ANML.net --learner ncm --power 1 --backend fast", "ANML, nearest class mean --power 1"),
        ("--model ANML.net --learner map --nested", "ANML, GeMCL-MAP"),
        ("--model ANML.net --learner predictive", "ANML, GeMCL predictive"),
        ("--model ANML.net --learner slda --train_images 1", "ANML, streaming LDA"),
        ("--model OML.net --learner slda", "OML, streaming LDA"),
        ("--model Pretrain.net --learner map", "Pretrain, GeMCL-MAP"),
        ("--model sANML.net --learner ncm", "sANML, nearest class mean"),  # of 4 outputs: none is used
        ("--model ANML.net --scratch --learner ncm --features gate", "Scratch, nearest class mean"),
    ],
)
def test_each_network_with_heads(flags: str, treatment: str, evaluate: Evaluate) -> None:
    results = read_results(evaluate(f"{TINY} --schedule 2 10 --runs 1 {flags}"))
    assert results.about["treatment"].startswith(treatment)
    assert [row["lr"] for row in results.rows] == [None, None]
    assert all(row["diverged"] == 0 and row["test"] > 1 / row["classes"] for row in results.rows)


def test_several_models_are_tracked_and_resumed(evaluate: Evaluate) -> None:
    flags = f"{TINY} --schedule 2 5 --model ANML.net ANML1.net --learner slda --track_every 2"
    whole = evaluate(f"{flags} --runs 3")
    begun = evaluate(f"{flags} --runs 2")
    evaluate(f"--resume {begun} --runs 3 --features both")
    assert (begun / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    results = read_results(whole)
    assert (begun / "forgetting_5.csv").read_bytes() == (whole / "forgetting_5.csv").read_bytes()
    assert table(results.rows).splitlines()[1].split()[:3] == ["2", "-", "6"]
    with pytest.raises(UserError, match=r"its treatment was .* --power 1"):
        evaluate(f"--resume {begun} --power 1")


@pytest.fixture
def mine(
    evaluate: Evaluate, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], list[dict[str, Any]]]:
    """Runs a file that the documentation shows as it says, with flags; the rows of its results."""

    def start(mark: str, flags: str) -> list[dict[str, Any]]:
        code = shown("extending.md", mark)
        assert code.count("\n") <= 30
        Path("mine.py").write_text(code, encoding="utf-8")
        flags = f"{TINY} --schedule 5 --runs 2 --model ANML.net --cache_dir={cache} {flags}"
        monkeypatch.setattr(sys, "argv", ["mine.py", *flags.split()])
        for name in ("cosine", "replay"):
            monkeypatch.setitem(LEARNERS, name, LEARNERS["ncm"])  # to be forgotten afterwards
        runpy.run_path("mine.py", run_name="__main__")
        return read_results(max(Path("runs").iterdir(), key=lambda path: path.stat().st_ctime_ns)).rows

    return start


def test_a_head_of_ones_own(mine: Callable[[str, str], list[dict[str, Any]]]) -> None:
    assert mine("learner", "--learner cosine --features gate")[0]["test"] > 0.2
    assert read_results(Path("runs/e_0")).about["treatment"] == "ANML, cosine --features gate"


def test_replay(mine: Callable[[str, str], list[dict[str, Any]]], evaluate: Evaluate) -> None:
    """Without weight it gives the base run's numbers; it has the flags of steps, and flags of its own."""
    search = "--lrs 0.01 0.003 --lr_search_runs 1 --rln 7"
    base = mine("replay", f"{search} --learner adam")
    assert mine("replay", f"{search} --learner replay --strength 0") == base
    assert mine("replay", f"{search} --learner replay --buffer 0") == base
    replayed = mine("replay", f"{search} --learner replay")
    assert [row["train"] for row in replayed] > [row["train"] for row in base]
    about = read_results(Path("runs/e_2")).about
    assert about["treatment"] == "ANML-FT:PLN, replay --buffer 0"
    assert about["options"] == {"buffer": 0, "strength": 1.0}


def test_a_network_without_a_gate_is_resumed(evaluate: Evaluate) -> None:
    begun = evaluate(f"{TINY} --schedule 2 --runs 1 --model OML.net --learner slda")
    assert read_results(evaluate(f"--resume {begun} --runs 2")).about["options"]["features"] == "gated"
