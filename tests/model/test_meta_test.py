"""The meta-test of a network: its draws, its outputs, divergence, and stops on the way."""

from functools import partial
from typing import Any

import pytest
import torch

import model.meta_test
from datasets.images import Pool
from datasets.task_sampler import Task, sample_task
from evaluation.runs import by_class
from model.fast import BACKENDS
from model.layers import cat, parts
from model.meta_test import CHUNK, FrozenOutputs, MetaTest, with_outputs
from model.method import classify
from model.modelfactory import Network, build, trained_parameters
from tests.conftest import pooled
from utils.errors import UserError

WIDTHS = {"nm_channels": 4, "pln_channels": 4, "num_classes": 20}


def test_draws_of_search_and_report_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws of one evaluation differ, and a draw is the same for all learning rates."""
    drawn: list[bytes] = []

    def spy(*args: Any, **options: Any) -> Task:
        task = sample_task(*args, **options)
        drawn.append(torch.cat([task.train, task.test], 1).numpy().tobytes())
        return task

    monkeypatch.setattr(model.meta_test, "sample_task", spy)
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    meta_test = MetaTest(net, pooled(torch.randn(10, 20, 1, 28, 28)), 13, seed=0)
    for purpose in model.meta_test.PURPOSES:
        for draw in range(10):
            for lr in (0.1, 0.01):
                meta_test.score(2, lr, purpose, draw)
    assert drawn[0::2] == drawn[1::2]
    assert len(set(drawn)) == 30


def test_frozen_outputs_of_classes_of_several_sizes() -> None:
    """The same to the last bit whichever images are asked for first, and those of the network; computed for
    the classes in use, and of a large class for the images in use."""
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    pool = Pool(torch.randn(CHUNK + 17, 3, 28, 28), (5, CHUNK + 1, 6, 5))
    trained, index = trained_parameters(net, 13), torch.tensor([[1, CHUNK], [2, 5], [0, 0], [1, 3], [2, 0]])
    kept, turned = FrozenOutputs(net, pool, trained), FrozenOutputs(net, pool, trained)
    backwards, found = turned.get(index.flip(0)), kept.get(index)
    assert len(kept.known) == 2 + 6 + 5
    expected = net.frozen(torch.stack([pool[c][k] for c, k in index.tolist()]), trained)
    torch.testing.assert_close(parts(found), parts(expected))
    for others in backwards[torch.arange(4, -1, -1)], cat([found[:2], found[2:]]):
        torch.testing.assert_close(parts(found), parts(others), rtol=0, atol=0)
    trained, grey = trained_parameters(net, 7), Pool(torch.randn(8, 1, 28, 28), (4, 4))
    kept = FrozenOutputs(net, grey, trained)
    expected = net.frozen(grey.rows[5:6], trained)
    torch.testing.assert_close(parts(kept.get(torch.tensor([[1, 1]]))), parts(expected))
    assert [part.shape[1] for part in kept.kept if part.ndim == 4] == [1], "three times the memory"
    size = sum(part.nbytes for part in kept.kept)
    assert [FrozenOutputs(net, grey, trained, budget).keeps for budget in (size, size - 1)] == [True, False]


@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize("iid", [False, True])
def test_as_many_classes_as_outputs_of_a_larger_pool(backend: str, iid: bool) -> None:
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    BACKENDS[backend].prepare(net)
    outputs = net.num_outputs
    images = torch.randn(outputs + 9, 20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    pool = pooled(images[:, :1] + 0.1 * images)
    options: Any = {"kind": BACKENDS[backend].learner("adam"), "iid": iid}
    assert MetaTest(net, pool, 13, 0, **options).score(outputs, 0.01, "report", 0)["test"] > 2 / outputs
    assert MetaTest(net, pool, 0, 0, **options).score(2, 1e30, "report", 0)["diverged"]
    with pytest.raises(UserError, match=f"{outputs} outputs"):
        MetaTest(net, pool, 13, 0).score(outputs + 1, 0.01, "report", 0)
    wide = with_outputs(net, outputs + 9)
    BACKENDS[backend].prepare(wide)
    below = {name: value for name, value in net.state_dict().items() if not name.startswith("head.")}
    assert all(torch.equal(wide.state_dict()[name], value) for name, value in below.items())
    assert MetaTest(wide, pool, 13, 0, **options).score(outputs + 9, 0.01, "report", 0)["test"] > 2 / outputs
    del net.widths["num_classes"]
    with pytest.raises(UserError, match=f"{outputs} outputs"):
        with_outputs(net, outputs + 1)


def test_divergence_is_seen_in_weights_and_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, torch.nan, 1.0], [torch.inf, 1.0, 0.0], [3.0, 1.0, 2.0]])
    assert classify(logits).tolist() == [1, -1, -1, 0]
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    meta_test = MetaTest(net, pooled(torch.randn(3, 20, 1, 28, 28)), 6, seed=0)
    assert meta_test.score(3, 0.01, "report", 0)["diverged"] == 0
    original = model.meta_test.new_run

    def saturated(*arguments: Any) -> Network:
        run = original(*arguments)
        with torch.no_grad():
            run.get_parameter("nm.gate.bias")[0] = torch.inf  # opens the gate: logits are finite
        return run

    monkeypatch.setattr(model.meta_test, "new_run", saturated)
    score = meta_test.score(3, 0.01, "report", 0)
    assert (score["diverged"], score["train"], score["above_chance"]) == (1, 0, 0)


@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize(("rln", "kind"), [(0, "adam"), (13, "adam"), (13, "map"), (13, "slda")])
def test_a_sequence_tested_on_its_way_gives_what_one_that_ends_there_gives(
    rln: int, kind: str, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    net = build("ANML", WIDTHS, generator)
    BACKENDS[backend].prepare(net)
    pool = pooled(torch.randn(6, 8, 1, 28, 28, generator=generator))
    kept_or_not = []
    for budget in (2**30, 0):  # frozen outputs are kept, or computed for every pass
        meta_test = MetaTest(
            *(net, pool, rln, 0),
            train_images=4,
            test_images=3,
            kind=BACKENDS[backend].learner(kind),
            background=pool,
        )
        meta_test.outputs = FrozenOutputs(net, pool, meta_test.trained, budget)
        walk = partial(meta_test.walk, lr=0.01, purpose="report", draw=0)
        way = [answers.score() for answers in walk((1, 2, 4, 5), drawn=6)]
        ends = [answers.score() for n in (1, 2, 4, 5) for answers in walk((n,), drawn=6)]
        assert way == ends
        kept_or_not.append(way)
        assert [answers.score() for answers in walk((2, 4), drawn=4)][-1] == meta_test.score(
            4, 0.01, "report", 0
        )
        assert meta_test.score(5, 0.01, "report", 0) != ends[-1]  # another draw
    assert kept_or_not[0] == kept_or_not[1]
    moments = [by_class(answers) for answers in walk((2, 4), drawn=4)]
    assert [(row["seen"], row["position"]) for rows in moments for row in rows] == [
        (seen, position) for seen in (2, 4) for position in range(seen)
    ]
    assert len({row["class"] for row in moments[-1]}) == 4
    # Whoever has learned two classes only knows as much of them as was measured at that time.
    assert [row["class"] for row in moments[0]] == [row["class"] for row in moments[-1][:2]]
    with pytest.raises(ValueError, match="one class after another"):
        list(MetaTest(net, pool, rln, 0, iid=True).walk((2, 4), 0.01, "report", 0, drawn=4))
