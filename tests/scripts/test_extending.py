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
from tests.conftest import ROOT, Trainer, process, rows
from utils.errors import UserError

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")

IID = "--learner=iid", "--learner=smoothed"


def example(tag: str) -> str:
    code = PAGE.split(f"<!-- {tag} -->")[1].split("```")[1].removeprefix("python\n")
    assert code.count("\n") <= 15
    return code


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
    if base:  # a network that knows no --nm_channels
        trainer.flags = [
            *["--dataset=glyphs", "--pln_channels=4", "--steps=4", "--threads=1"],
            trainer.flags[-1],
        ]
    monkeypatch.setitem(table, flags.partition("=")[2], None)  # to be forgotten afterwards
    exec(compile(example(tag), tag, "exec"), {**vars(module)})  # noqa: S102 (our own documentation)
    trainer(*base.split(), "--name=base")
    trainer(flags, f"{strength}=0", "--name=none")
    trainer(flags, f"{strength}=0.5", "--name=half")
    assert losses("base") == losses("none") != losses("half")
    assert len(losses("half")) == 4


def test_from_python(tmp_path: Path) -> None:
    code = example("from python").replace("path/to/this/project", str(ROOT))
    Path(tmp_path, "mine.py").write_text(
        f"{code}\nprint(folder, len(losses), tested, accuracies)\n", encoding="utf-8"
    )
    done = process(tmp_path, sys.executable, "mine.py", PYTHONPATH="")
    assert done.stderr == ""
    results = read_results(tmp_path / "runs/Omni_test_traj_0")
    found = f"runs/smoke_0 3 runs/Omni_test_traj_0 {[row['test'] for row in results.rows]}"
    assert done.stdout.splitlines()[-1] == found
    assert [(row["classes"], row["lr"]) for row in results.rows] == [(n, 0.01) for n in (5, 5, 10, 10)]
    assert (tmp_path / "runs/smoke_0/model.net").exists()
    code = f"import sys, types; sys.modules['datasets'] = types.ModuleType('datasets')\n{code}"
    Path(tmp_path, "mine.py").write_text(code, encoding="utf-8")
    taken = process(tmp_path, sys.executable, "mine.py", PYTHONPATH="").stderr.splitlines()[-1]
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
