"""Results files: what is written comes back, and a wrong file is named with what is wrong in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evaluation.results import (
    METRICS,
    bootstrap_interval,
    cluster_interval,
    compare,
    interval,
    read_metrics,
    read_results,
    summarise,
    table,
    write_results,
)
from tools import compare_results
from utils.errors import UserError

HEADER = "model,classes,run,lr,test,train,above_chance,diverged"
LINE = "a.net,10,0,0.001,0.8,0.9,10,0"


def row(**changes: Any) -> dict[str, Any]:
    values = {"model": "a.net", "classes": 10, "run": 0, "lr": 0.001, "test": 0.1 + 0.2, "train": 0.9}
    return {**values, "above_chance": 10, "diverged": 0, **changes}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    rows = [row(), row(run=1), row(model="b.net"), row(classes=50, test=1 / 3)]
    write_results(tmp_path, rows, {"treatment": "ANML"})
    for path in (tmp_path, tmp_path / "results.csv", tmp_path / "results.json"):
        results = read_results(path)
        assert results.rows == rows
        assert results.about == {"treatment": "ANML"}
    (tmp_path / "results.json").unlink()
    assert read_results(tmp_path).about == {}


def test_a_file_of_an_editor(tmp_path: Path, edited: Callable[[bytes], bytes]) -> None:
    rows = [row(model="zürich.net"), row(model="zürich.net", run=1)]
    write_results(tmp_path, rows, {"treatment": "ANML"})
    metrics = f"{','.join(METRICS)}\n1,0.5,0.25,0\n2,0.5,0.25,1\n"
    (tmp_path / "metrics.csv").write_text(metrics)
    for path in tmp_path.iterdir():
        path.write_bytes(edited(path.read_bytes()))
    for name in ("results.csv", "results.json"):
        assert read_results(tmp_path / name).rows == rows
        assert read_results(tmp_path / name).about == {"treatment": "ANML"}
    assert read_metrics(tmp_path)["accuracy_remember"].tolist() == [0, 1]


def test_a_file_without_a_model_column(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("classes,run,lr,test,train,above_chance\n10,0,0.001,0.8,0.9,10\n")
    assert read_results(path).rows == [row(model="", test=0.8, diverged=None)]


def test_a_measure_that_a_file_lacks_is_missing(tmp_path: Path) -> None:
    older, mixed = tmp_path / "older.csv", tmp_path / "mixed.csv"
    older.write_text("classes,run,lr,test\n10,0,0.001,0.8\n")
    assert read_results(older).rows == [row(model="", test=0.8, train=None, above_chance=None, diverged=None)]
    (line,) = summarise(read_results(older).rows)
    assert line["test"] == 0.8
    assert [line[key] for key in ("train", "train_low", "above_chance", "diverged")] == [None] * 4
    assert table(read_results(older).rows).splitlines()[1].split()[-3:] == ["-"] * 3
    assert "train_u" not in compare(read_results(older).rows, [row()])[0]
    mixed.write_text(f"{HEADER}\n{LINE}\n{LINE.replace(',0,', ',1,').replace('0.8', '')}\n")
    rows = read_results(mixed).rows
    assert [found["test"] for found in rows] == [0.8, None]
    assert (summarise(rows)[0]["test"], summarise(rows)[0]["train"]) == (0.8, 0.9)
    write_results(tmp_path, rows, {})
    for path in (tmp_path, tmp_path / "results.json"):
        assert read_results(path).rows == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no runs"),
        (HEADER, "no runs"),
        ("classes,accuracy\n10,0.5", "line 2: the columns should be"),
        (f"{HEADER},extra\n{LINE},1", "extra"),
        ("classes,run,lr\n10,0,0.001", "line 2: the columns should be"),
        ("run,lr,test\n0,0.001,0.5", "line 2: the columns should be"),
        (f"{HEADER}\n{LINE},7", "columns"),
        (f"{HEADER}\n{LINE}\na.net,10,1,0.5", "line 3: fewer fields"),
        (f"{HEADER}\n{LINE}".replace("0.8", "nan"), "test is 'nan', not an accuracy"),
        (f"{HEADER}\n{LINE}".replace("0.8", "80"), "test is '80', not an accuracy"),
        (f"{HEADER}\n{LINE}".replace("0.9", "-0.1"), "train is '-0.1'"),
        (f"{HEADER}\n{LINE}".replace(",10,0,", ",10.5,0,"), "classes is '10.5'"),
        (f"{HEADER}\n{LINE}".replace("0.001", "inf"), "lr is 'inf'"),
        (f"{HEADER}\n{LINE}".replace("0.001", "0"), "lr is '0'"),
        (
            f"{HEADER}\n{LINE}".replace("0.9,10", "0.9,11"),
            "above_chance is '11', not a number of classes from 0 to 10",
        ),
        (f"{HEADER}\n{LINE}"[:-1] + "2", "diverged is '2', not a whole number from 0 to 1"),
        (f"{HEADER}\n{LINE}\n{LINE}", "twice"),
    ],
)
def test_a_wrong_csv(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.csv") as refused:
        read_results(path)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "holds a list"),
        ("{}", "no list of runs"),
        ('{"runs": [1]}', "no list of runs"),
        (json.dumps({"runs": [row(test=float("nan"))]}), "test is nan"),
        (json.dumps({"runs": [row(classes=True)]}), "classes is True"),
        (json.dumps({"runs": [{}]}), "run 0: the columns"),
    ],
)
def test_a_wrong_json(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.json") as refused:
        read_results(path)
    assert message in str(refused.value)


def test_no_results(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "binary.csv"):
        with pytest.raises(UserError, match=str(path)):
            read_results(path)


def test_one_model_has_the_interval_of_its_runs() -> None:
    values = [0.1, 0.4, 0.2, 0.35, 0.3] * 2
    expected = stats.bootstrap(
        (np.array(values),), np.mean, method="percentile", rng=np.random.default_rng(0)
    )
    assert cluster_interval([values]) == bootstrap_interval(values) == tuple(expected.confidence_interval)
    (line,) = summarise([row(run=k, test=value) for k, value in enumerate(values)])
    assert (line["test_low"], line["test_high"]) == bootstrap_interval(values)
    assert line["test_interval"] == "bootstrap over runs"
    # One run of each model: models are what is resampled.
    assert interval([[value] for value in values]) == (*bootstrap_interval(values), "bootstrap over models")
    assert cluster_interval([[value] for value in values]) == bootstrap_interval(values)


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    (line,) = summarise([row(test=0.56)])
    assert line["test"] == 0.56
    assert [line[f"test_{end}"] for end in ("low", "high", "interval")] == [None] * 3
    _, cells = table([row(test=0.56)]).splitlines()  # and no line on intervals
    assert " ".join(cells.split()) == "10 0.001 1 56.0 - 90.0 - 10.0 0"
    write_results(tmp_path, [row()], {})
    assert '"test_low": null' in (tmp_path / "results.json").read_text()


def test_diverged_runs_have_nothing_right(tmp_path: Path) -> None:
    """They count, since the mean of what did not diverge would praise a rate that mostly does."""
    nothing = {"test": 0.0, "train": 0.0, "above_chance": 0, "diverged": 1}
    rows = [row(test=0.6), row(run=1, **nothing), row(classes=50, **nothing)]
    some, every = summarise(rows)
    assert (some["test"], some["diverged"]) == (0.3, 1)
    assert (every["test"], every["test_low"], every["above_chance"], every["diverged"]) == (
        None,
        None,
        None,
        1,
    )
    lines = table(rows).splitlines()
    assert lines[0].split()[-1] == "diverged"
    assert [line.split()[-1] for line in lines[1:3]] == ["1", "1"]
    assert lines[2].split()[3:5] == ["diverged", "diverged"]
    write_results(tmp_path, rows, {})
    assert read_results(tmp_path).rows == rows
    assert "2 of them diverged" in compare_results.describe(tmp_path, read_results(tmp_path))


def test_few_runs_have_the_interval_of_student() -> None:
    values = [0.1, 0.4, 0.2, 0.35, 0.3]
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    rows = [row(run=k, test=value) for k, value in enumerate(values)]
    (line,) = summarise(rows)
    assert (line["test_low"], line["test_high"]) == pytest.approx(expected)
    assert line["test_interval"] == "Student's t over runs"
    assert table(rows).splitlines()[-1] == "[ ] 95% interval: Student's t over runs"
    assert interval([[value] * 4 for value in values]) == pytest.approx(
        (*expected, "Student's t over models"), abs=1e-12
    )
    assert interval([[0.8, 1.0]]) == (0.0, 1.0, "Student's t over runs")  # accuracies end there
    assert interval([[0.5, 0.5]]) == (0.5, 0.5, "Student's t over runs")


def test_intervals_hold_what_they_promise() -> None:
    """Of samples whose mean is known, 95% have an interval that holds it, whatever their numbers."""
    rng = np.random.default_rng(0)
    for sizes in ([2], [3], [5], [1, 1, 1], [4, 4, 4], [2, 6, 4, 5], [3] * 8):
        held = 0
        for _ in range(1000):
            models = rng.normal(0.5, 0.03 * (len(sizes) > 1), len(sizes))
            found = interval(
                [rng.normal(mean, 0.02, n).tolist() for mean, n in zip(models, sizes, strict=True)]
            )
            assert found is not None
            held += found.low <= 0.5 <= found.high
        assert 0.92 < held / 1000 < 0.98, sizes  # resampling 3 values: 0.72


def test_runs_of_one_model_do_not_count_as_models() -> None:
    """Models that differ and repeat themselves exactly: the interval is that of the models' means."""
    means = [0.1, 0.4, 0.2, 0.35, 0.3]
    low, high = bootstrap_interval(means)
    wide = cluster_interval([[mean] * 20 for mean in means])
    assert wide == pytest.approx((low, high), abs=0.01)
    narrow = bootstrap_interval([mean for mean in means for _ in range(20)])
    assert narrow[1] - narrow[0] < 0.3 * (wide[1] - wide[0])


def test_an_interval_of_models_that_are_alike() -> None:
    """Models of one distribution: the variance is that of means of models and of runs within them."""
    rng = np.random.default_rng(1)
    groups = rng.normal(0.5, 0.1, (10, 10))
    low, high = cluster_interval(groups.tolist())
    # What resampling of both levels has as its variance, in closed form.
    between = groups.mean(1).var() / 10
    within = groups.var(1).mean() / 100
    half = 1.96 * np.sqrt(between + within)
    assert (low, high) == pytest.approx((groups.mean() - half, groups.mean() + half), abs=0.003)


def test_models_with_unequal_numbers_of_runs() -> None:
    assert cluster_interval([[0.5], [0.5, 0.5]]) == (0.5, 0.5)
    low, high = cluster_interval([[0.0], [1.0, 1.0, 1.0]])
    assert (low, high) == (0.0, 1.0)  # a quarter of the resamples is of the one model twice, each
    rows = [row(test=0.0), *(row(model="b.net", run=k, test=1.0) for k in range(3))]
    (line,) = summarise(rows)
    assert (line["models"], line["runs"], line["test"]) == (2, 4, 0.75)


def test_mann_whitney_by_hand() -> None:
    """U is the number of pairs in which `a` is better, ties counting half."""
    a = [row(run=k, test=value) for k, value in enumerate((0.1, 0.5, 0.9))]
    b = [row(run=k, test=value) for k, value in enumerate((0.2, 0.5))]
    (line,) = compare(a, [*b, row(classes=50)])
    assert line["test_u"] == 0 + 1.5 + 2
    assert (line["runs_a"], line["runs_b"], line["classes"]) == (3, 2, 10)
    assert line["test_a"] == pytest.approx(0.5)
    assert line["train_p"] == 1  # all equal
    # 3 against 3 without overlap: the most extreme of 20 orders, on two sides.
    apart = [[row(run=k, test=base + k / 100) for k in range(3)] for base in (0.1, 0.7)]
    (line,) = compare(*apart)
    assert (line["test_u"], line["test_p"]) == (0, pytest.approx(2 / 20))


def test_mann_whitney_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal((0.6, 0.65), 0.05, (100, 2)).T
    a, b = ([row(run=k, train=value) for k, value in enumerate(sample)] for sample in samples)
    (line,) = compare(a, b)
    expected = stats.mannwhitneyu(*samples, alternative="two-sided")
    assert (line["train_u"], line["train_p"]) == (expected.statistic, expected.pvalue)
    # Other way round, the same p and the other pairs.
    (back,) = compare(b, a)
    assert back["train_p"] == pytest.approx(line["train_p"])
    assert back["train_u"] == 100 * 100 - line["train_u"]


def compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: object) -> str:
    monkeypatch.setattr(sys, "argv", ["compare_results.py", *map(str, flags)])
    compare_results.main()
    return capsys.readouterr().out


def test_comparing_two_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    shared = [row(run=k, test=k / 10) for k in range(5)]
    write_results(a, [*shared, row(classes=75)], {"treatment": "ANML"})
    write_results(b, [*shared, row(classes=50), row(classes=100)], {"treatment": "OML"})
    out = compared(capsys, monkeypatch, a, b / "results.csv")
    assert f"A  {a}: ANML, 6 runs of 1 model\n" in out
    assert "only in A, not compared: 75 classes" in out
    assert "only in B, not compared: 50 100 classes" in out
    assert " ".join(out.splitlines()[-1].split()) == "10 5/5 20.0 20.0 12.5 1 90.0 90.0 12.5 1"
    content = json.loads(compared(capsys, monkeypatch, a, b, "--json"))
    assert (content["only_a"], content["only_b"]) == ([75], [50, 100])
    assert content["comparison"] == compare(shared, shared)
