"""Libraries that cannot be imported, settings of other programs, repositories around this one."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import evaluate_classification
import mrcl_classification
from evaluation import plots
from flags.training import Training
from tests.conftest import ROOT, Call, Evaluate, Trainer, process
from tools import analyze_representation
from utils import run as run_module
from utils.run import Run

EVALUATE = "--dataset glyphs --model ANML.net --test_classes 10 --schedule 3 --lr 0.01 --runs 2 --threads 1"


@pytest.mark.parametrize(
    ("script", "library", "flags"),
    [
        (evaluate_classification, "matplotlib", EVALUATE),
        (mrcl_classification, "matplotlib.figure", "--dataset glyphs --eval_every 1 --steps 1"),
        (analyze_representation, "matplotlib", EVALUATE.split(" --schedule")[0]),
        (mrcl_classification, "torchvision", "--dataset_path empty"),
    ],
)
def test_a_library_that_cannot_be_imported(
    script: ModuleType,
    library: str,
    flags: str,
    call: Call,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said in one line before the work begins."""
    (tmp_path / "ANML.net").write_bytes((models / "ANML.net").read_bytes())
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    done = call(script, *flags.split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"cannot import {library.partition('.')[0]}: " in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_library_that_all_scripts_need(tmp_path: Path) -> None:
    """Also where Python does not look for modules beside a script; both begin alike, see test_scripts."""
    for name in ("numpy", "torch", "PIL/__init__", "PIL/Image"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise ImportError('no codecs')" if name == "PIL/Image" else "")
    script = str(ROOT / "mrcl_classification.py")
    done = process(tmp_path, sys.executable, script, PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: cannot import PIL: no codecs; ")


def test_a_figure_that_fails_ends_no_run(
    evaluate: Evaluate, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*size: float) -> None:
        raise RuntimeError("latex was not\nfound")

    monkeypatch.setattr(plots, "new_figure", fail)
    run = evaluate(f"{EVALUATE} --track_every 1")
    said = capsys.readouterr().out
    assert (run / "results.csv").read_text().count("\n") == 3
    assert not (run / "accuracy.png").exists()
    for name in ("accuracy", "forgetting_3"):
        assert f"warning: {name}.png is not drawn: latex was not found\n" in said
    trainer("--eval_every=2", "--eval_classes=2", "--steps=4")
    assert trainer.state().step == 4
    assert capsys.readouterr().out.count("warning: meta_val/gate is not drawn: latex") == 2


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip()


def test_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of a repository around a copy of this project, nor of one whose hook starts a run."""

    def recorded() -> object:
        with Run.open(tmp_path, "n", None, Training()) as run:
            return json.loads((run.folder / "config.json").read_text())["git"]

    head = git(ROOT, "rev-parse", "HEAD")  # a copy without a repository has none
    dirty = bool(git(ROOT, "status", "--porcelain"))
    assert recorded() == ({"commit": head, "dirty": dirty} if head else None)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "of another project")
    assert git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "copy/utils").mkdir(parents=True)
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "copy/utils/run.py"))
    assert recorded() is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert recorded() is None
