"""Results files: what is written comes back, and a wrong file is named with what is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from utils.results import read_results, write_results

HEADER = "model,classes,run,lr,test,train,above_chance"
LINE = "a.net,10,0,0.001,0.8,0.9,10"


def row(**changes: Any) -> dict[str, Any]:
    values = {"model": "a.net", "classes": 10, "run": 0, "lr": 0.001, "test": 0.1 + 0.2, "train": 0.9}
    return {**values, "above_chance": 10, **changes}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    rows = [row(), row(run=1), row(model="b.net"), row(classes=50, test=1 / 3)]
    write_results(tmp_path, rows, {"treatment": "ANML"})
    for path in (tmp_path, tmp_path / "results.csv", tmp_path / "results.json"):
        results = read_results(path)
        assert results.rows == rows
        assert results.about == {"treatment": "ANML"}
    (tmp_path / "results.json").unlink()
    assert read_results(tmp_path).about == {}


def test_a_file_without_a_model_column(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("classes,run,lr,test,train,above_chance\n10,0,0.001,0.8,0.9,10\n")
    assert read_results(path).rows == [row(model="", test=0.8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no runs"),
        (HEADER, "no runs"),
        ("classes,accuracy\n10,0.5", "line 2: the columns should be"),
        (f"{HEADER},extra\n{LINE},1", "extra"),
        (f"{HEADER}\n{LINE},7", "columns"),
        (f"{HEADER}\n{LINE}\na.net,10,1,0.5", "line 3: test is None"),
        (f"{HEADER}\n{LINE}".replace("0.8", "nan"), "test is 'nan', not an accuracy"),
        (f"{HEADER}\n{LINE}".replace("0.8", "80"), "test is '80', not an accuracy"),
        (f"{HEADER}\n{LINE}".replace("0.9", "-0.1"), "train is '-0.1'"),
        (f"{HEADER}\n{LINE}".replace(",10,0,", ",10.5,0,"), "classes is '10.5'"),
        (f"{HEADER}\n{LINE}".replace("0.001", "inf"), "lr is 'inf'"),
        (f"{HEADER}\n{LINE}".replace("0.001", "0"), "lr is '0'"),
        (f"{HEADER}\n{LINE}"[:-2] + "11", "11 classes above chance"),
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
