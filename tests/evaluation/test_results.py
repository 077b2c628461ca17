"""Results files: what is written comes back, and a wrong file is named with what is wrong in it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from evaluation.results import (
    METRICS,
    Key,
    interval,
    known_scores,
    read_metrics,
    read_results,
    shown,
    summarise,
    table,
    write_results,
)
from model.scores import MEASURES, TENTHS, Answers
from tests.conftest import EDITORS, Call, score
from tools import compare_results
from utils.errors import UserError

VALUES = [0.1, 0.4, 0.2, 0.35, 0.3]


def row(**changes: Any) -> dict[str, Any]:
    values = {"model": "a.net", "classes": 10, "run": 0, "lr": 0.001}
    return values | score(test=0.1 + 0.2, train=0.9, above_chance=10) | changes


def line(**changes: Any) -> str:
    return ",".join("" if value is None else str(value) for value in row(**changes).values())


HEADER, LINE = ",".join(row()), line()
JOURNAL, SCORES = ",".join((*Key._fields, *MEASURES)), ",".join("0" for _ in MEASURES)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    """Also from what an editor made of it."""
    rows = [row(model="zürich.net"), row(run=1, lr=None), row(model="b.net"), row(classes=50, test=1 / 3)]
    write_results(tmp_path, rows, {"treatment": "ANML"})
    (tmp_path / "metrics.csv").write_text(f"{','.join(METRICS)}\n1,0.5,0.25,0\n2,0.5,0.25,1\n")
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for change in (bytes, *EDITORS.values()):
        for path, content in written.items():
            path.write_bytes(change(content))
        for path in (tmp_path, tmp_path / "results.csv", tmp_path / "results.json"):
            assert read_results(path) == (rows, {"treatment": "ANML"})
        assert read_metrics(tmp_path)["accuracy_remember"].tolist() == [0, 1]
    (tmp_path / "results.json").unlink()
    assert read_results(tmp_path).about == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{JOURNAL},test\n", "columns"),
        (f"{JOURNAL}\nsearch,a,2,0,0.1,{SCORES.replace('0', 'nan', 1)}\n", "line 2: test: 'nan'"),
        (f"{JOURNAL}\nsearch,a,2,0,0.1,0.5\n", "line 2: 6 fields"),
        (f"{JOURNAL}\nsearch,a,2,0,x,{SCORES}\n", "'x'"),
        (f"{JOURNAL.replace('test', 'other')}\n", "lacks the columns test"),
        ("\xff\x00\n", "not text"),
        ("", "columns"),
        (HEADER, "no runs"),
        (f"{HEADER},test\n{LINE},1", "columns"),
        (f"{HEADER.removeprefix('model,')}\n{LINE}", "columns"),
        (f"{HEADER}\n{LINE}\na.net,10,1,0.5", f"line 3: 4 fields instead of {len(row())}"),
        (f"{HEADER}\n{line(test='nan')}", "line 2: test: 'nan' is not a finite number"),
        (f"{HEADER}\n{line(test='')}", "test: '' is not"),
        (f"{HEADER}\n{line(train=-0.1)}", "train: '-0.1': choose 0 or greater"),
        (f"{HEADER}\n{line(classes=10.5)}", "'10.5'"),
        (f"{HEADER}\n{line(lr='inf')}", "lr: 'inf'"),
        (f"{HEADER}\n{line(lr=0)}", "lr: '0'"),
        (f"{HEADER}\n{line(above_chance=-1)}", "above_chance: '-1': choose 0 or greater"),
        (f"{HEADER}\n{line(diverged=2)}", "diverged: '2': choose 0 or greater, at most 1"),
        (f"{HEADER}\n{LINE}\n{LINE}", "line 3: the same"),
        (f'{HEADER}\n"{LINE}', "not a CSV"),
        ("\xff\xfe\x00", "not text"),
    ],
)
def test_a_wrong_csv(text: str, message: str, tmp_path: Path) -> None:
    path, content = tmp_path / "r.csv", text.encode("latin-1")
    path.write_bytes(content)
    read = known_scores if text.endswith("\n") else read_results
    with pytest.raises(UserError, match=r"r\.csv") as refused:
        read(path)
    assert message in str(refused.value)
    assert path.read_bytes() == content


def test_results_of_other_measures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A measure without a column has no value; a column of no measure is named once, and kept."""
    path, rows = tmp_path / "results.csv", [row(), row(run=1)]
    write_results(tmp_path, rows, {})
    path.write_text(path.read_text().replace("train", "other"))
    (line,) = summarise(read_results(path).rows)
    assert line["test"] == 0.1 + 0.2
    assert not any(name.startswith("train") for name in line)
    assert table(read_results(path).rows).splitlines()[1].split()[3:7] == ["30.0", "±", "0", "-"]
    assert "A train" not in compare_results.table(rows, read_results(path).rows, [10])
    assert caplog.messages == [f"{path}: other is no measure here: kept as it is"]


def test_position_and_volatility_by_hand(tmp_path: Path) -> None:
    """Of eleven classes the first tenth has two; two of them were tested before."""
    right = [5, 5, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    test = torch.arange(5) < torch.tensor(right)[:, None]
    before = torch.arange(5) < torch.tensor([[3], [5]])
    answers = Answers(test, test, False, torch.arange(11), before)
    found = answers.score()
    assert found["volatility"] == (abs(5 - 3) + abs(5 - 5)) / 10
    assert [found[name] for name in TENTHS] == pytest.approx([1, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0, 0])
    first = answers._replace(test=test[:9], before=None).score()
    assert {first[name] for name in (*TENTHS, "volatility")} == {None}
    runs = [row(**answers.score()), row(run=1, **{**found, "volatility": 0.4}), row(classes=9, **first)]
    write_results(tmp_path, runs, {})
    assert read_results(tmp_path).rows == runs
    nine, eleven = summarise(runs)
    assert "volatility" not in nine
    assert (eleven["volatility"], eleven["tenth_1"]) == (pytest.approx(0.3), 1)
    assert "volatility %" in table(runs)
    assert "tenth" not in table(runs)
    # A file of before has neither.
    text = (tmp_path / "results.csv").read_text().splitlines()
    old = [",".join(line.split(",")[:7] + line.split(",")[-1:]) for line in text]
    (tmp_path / "results.csv").write_text("\n".join(old))
    assert [line["test"] for line in summarise(read_results(tmp_path).rows)] == [nine["test"], eleven["test"]]
    assert {read_results(tmp_path).rows[0][name] for name in (*TENTHS, "volatility")} == {None}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]"])
def test_a_wrong_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(f"{HEADER}\n{LINE}\n")
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"r\.json is damaged"):
        read_results(tmp_path / "r.csv")


def test_diverged_runs_have_nothing_right(tmp_path: Path) -> None:
    """They count, since the mean of what did not diverge would praise a rate that mostly does."""
    nothing = score(diverged=1)
    rows = [row(test=0.6), row(run=1, **nothing), row(classes=50, **nothing)]
    some, every = summarise(rows)
    assert (some["test"], some["diverged"]) == (0.3, 1)
    assert (every["test"], every["diverged"]) == (None, 1)
    assert [line.split()[-1] for line in table(rows).splitlines()[:3]] == ["diverged", "1", "1"]
    write_results(tmp_path, rows, {})
    assert read_results(tmp_path).rows == rows


MANY = np.random.default_rng(1).normal(0.5, 0.1, (20, 10))
STUDENT = stats.t.interval(0.95, 4, np.mean(VALUES), stats.sem(VALUES))
# The models' sums are off by -0.02, 0 and 0.02 of 6 runs, whose mean is 0.5; 4.3027 is Student's t.
RATIO = 4.3027 * np.sqrt(3 / 2 * (0.02**2 + 0.02**2)) / 6
# The variance of a mean over models is that of the models' means.
HALF = 2.0930 * MANY.mean(1).std(ddof=1) / np.sqrt(20)


@pytest.mark.parametrize(
    ("groups", "low", "high", "reach", "method"),
    [
        ([VALUES], *STUDENT, 1e-12, "Student's t over runs"),
        ([[value] * 4 for value in VALUES], *STUDENT, 1e-12, "Student's t over models"),
        ([[0.48], [0.4, 0.6], [0.51, 0.5, 0.51]], 0.5 - RATIO, 0.5 + RATIO, 1e-5, "Student's t over models"),
        ([[0.8, 1.0]], 0, 1, 0, "Student's t over runs"),  # accuracies end there
        ([[0.5, 0.5]], 0.5, 0.5, 0, "Student's t over runs"),
        (MANY.tolist(), MANY.mean() - HALF, MANY.mean() + HALF, 1e-5, "Student's t over models"),
        ([[0.5], [0.5, 0.5]] * 5, 0.5, 0.5, 0, "Student's t over models"),
    ],
)
def test_interval(groups: list[list[float]], low: float, high: float, reach: float, method: str) -> None:
    ends = (pytest.approx(end, abs=reach, rel=0) for end in (low, high))
    assert interval(groups) == (*ends, method)


def test_a_summary_has_the_interval_of_its_runs() -> None:
    """A model counts as often as it has runs."""
    rows = [row(run=k, test=value) for k, value in enumerate(VALUES)]
    (line,) = summarise(rows)
    assert (line["test_low"], line["test_high"], line["test_interval"]) == interval([VALUES])
    assert table(rows).splitlines()[-1] == "± 95% interval: Student's t over runs"
    rows = [row(test=0.0), *(row(model="b.net", run=k, test=1.0) for k in range(3))]
    (line,) = summarise(rows)
    assert (line["models"], line["runs"], line["test"]) == (2, 4, 0.75)


def test_rounding_is_no_interval() -> None:
    """Sums of 0.6 that differ in their last digit are equal means."""
    runs = {"a": (0.1, 0.2, 0.3), "b": (0.3, 0.2, 0.1), "c": (0.2, 0.2, 0.2)}
    rows = [row(model=name, run=k, test=value) for name in runs for k, value in enumerate(runs[name])]
    assert len({sum(values) for values in runs.values()}) > 1
    assert shown(summarise(rows)[0], "test") == "20.0 ± 0"


def test_mann_whitney_by_hand() -> None:
    """U is the number of pairs in which `a` is better, ties counting half."""
    a = [row(run=k, test=value) for k, value in enumerate((0.1, 0.5, 0.9))]
    b = [row(run=k, test=value) for k, value in enumerate((0.2, 0.5))]
    lines = compare_results.table(a, [*b, row(classes=50)], [10]).splitlines()
    cells = re.sub(" ± [0-9.]+", "", lines[1]).split()
    assert cells[:5] == ["10", "3/2", "50.0", "35.0", str(0 + 1.5 + 2)]
    assert cells[6:10] == ["90.0", "90.0", "3", "1"]  # all equal
    assert lines[2:] == [f"{side}  ± 95% interval: Student's t over runs" for side in "AB"]
    several = [dict(one, model=f"{one['run']}.net") for one in a]
    assert compare_results.table(several, b, [10]).splitlines()[2].endswith("over models")
    # 3 against 3 without overlap: the most extreme of 20 orders, on two sides.
    a, b = ([row(run=k, test=base + k / 100) for k in range(3)] for base in (0.1, 0.7))
    cells = compare_results.table(a, b, [10]).splitlines()[1].split()
    assert cells[8:10] == ["0", str(2 / 20)]


def test_comparing_two_evaluations(tmp_path: Path, call: Call) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    shared = [row(run=k, test=k / 10) for k in range(5)]
    write_results(a, [*shared, row(classes=75)], {"treatment": "ANML"})
    write_results(b, [*shared, row(classes=50), row(classes=100)], {"treatment": "OML"})
    out = call(compare_results, str(a), str(b / "results.csv")).stdout
    assert f"A  {a}: ANML\nB  {b}/results.csv: OML\n" in out
    assert "10 5/5 20.0 20.0 12.5 1 90.0 90.0 12.5 1" in " ".join(re.sub(" ± [0-9.]+", "", out).split())
