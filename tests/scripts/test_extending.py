"""The examples of docs/extending.md for trainings, run where the page puts them."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import evaluate_classification
import mrcl_classification
from evaluation.results import read_results
from model import method, modelfactory, outer_loops
from tests.conftest import ROOT, Run, Trainer, process, rows, shown
from utils.errors import UserError

IID = "--learner=iid --treatment=ANML", "--learner=smoothed --treatment=ANML"


def losses(run: str) -> list[str]:
    return [row["loss"] for row in rows(Path(f"runs/{run}_0"))]


@pytest.mark.parametrize(
    ("tag", "module", "table", "base", "flags", "strength"),
    [
        ("inner rule", method, method.INNER_RULES, "", "--inner_rule=averaged", "--keep"),
        ("outer loop", outer_loops, outer_loops.OUTER_LOOPS, *IID, "--smoothing"),
        ("penalty", modelfactory, modelfactory.NETWORKS, "", "--treatment=Decayed", "--decay"),
    ],
)
def test_an_entry_of_a_table(
    tag: str,
    module: ModuleType,
    table: dict[str, Any],
    base: str,
    flags: str,
    strength: str,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strength 0 gives the numbers of the base, to the digit; one half gives others."""
    if base:
        trainer.flags.remove("--update_step=2")  # which means nothing there
    monkeypatch.setitem(table, flags.split()[0].partition("=")[2], None)  # to be forgotten afterwards
    code = shown("extending.md", tag)
    assert code.count("\n") <= 15
    exec(compile(code, tag, "exec"), {**vars(module)})  # noqa: S102 (our own documentation)
    trainer(*base.split(), "--name=base")
    trainer(*flags.split(), f"{strength}=0", "--name=none")
    trainer(*flags.split(), f"{strength}=0.5", "--name=half")
    assert losses("base") == losses("none") != losses("half")
    assert len(losses("half")) == 4


def test_from_python(tmp_path: Path, cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cache").symlink_to(cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {}
    code = shown("extending.md", "from python").replace("path/to/this/project", str(ROOT))
    exec(code, names)  # noqa: S102 (our own documentation)
    assert (names["folder"], len(names["losses"])) == (Path("runs/smoke_0"), 3)
    results = read_results(tmp_path / "runs/Omni_test_traj_0").rows
    assert names["accuracies"] == [row["test"] for row in results]
    assert [(row["classes"], row["lr"]) for row in results] == [(n, 0.01) for n in (5, 5, 10, 10)]
    assert (tmp_path / "runs/smoke_0/model.net").exists()
    code = f"import sys, types; sys.modules['datasets'] = types.ModuleType('datasets')\n{code}"
    taken = process(tmp_path, sys.executable, "-c", code, PYTHONPATH="").stderr.splitlines()[-1]
    assert taken.startswith("ImportError: another package called 'datasets' is loaded already")


TRAIN, EVALUATE = mrcl_classification.train, evaluate_classification.evaluate


@pytest.mark.parametrize(
    ("call", "arguments", "says"),
    [
        (TRAIN, {"steps": "many"}, "argument --steps: 'many' is not a whole number"),
        (TRAIN, {"stepz": 3}, "unrecognized arguments: --stepz=3"),
        (TRAIN, {"reset": 3}, "argument --reset"),
        (TRAIN, {"processes": 2}, "--processes 2 starts a script anew"),
        (TRAIN, {"learner": "iid", "ways": 3}, "--ways means nothing with --learner iid: it belongs to"),
        (EVALUATE, {"lrs": [0.1, "x"]}, "argument --lrs: 'x' is not a finite number"),
        (EVALUATE, {"model": "pretrained/nowhere.net"}, "cannot read the model pretrained/nowhere.net"),
    ],
)
def test_arguments_by_name(call: Callable[..., Path], arguments: Mapping[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        call(**arguments)
