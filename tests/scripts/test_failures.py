"""What is lost and what is said where disks are full, folders cannot be written, training diverges, libraries
cannot be imported, or repositories are those of others."""

import errno
import fcntl
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import evaluate_classification
import mrcl_classification
from evaluation import plots
from flags.training import Training
from model import training_state
from model.training_state import claimed, save_model
from tests.conftest import ROOT, Call, Evaluate, Trainer, process
from tools import analyze_representation
from utils import run as run_module
from utils.errors import UserError
from utils.files import Checkpoint, load_checkpoint
from utils.run import Progress, Run


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within this block, no file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Too small for TensorBoard's events, for the metrics, for the training state.
@pytest.mark.parametrize("size", [2_000, 4_000, 20_000])
def test_a_full_disk_keeps_the_last_good_state(size: int, trainer: Trainer) -> None:
    trainer("--steps=5")
    good = trainer.state()
    with largest_file(size), pytest.raises(UserError, match=r"cannot write .*: File too large"):
        trainer.resume("--steps=500", "--save_every=100")
    assert trainer.state().step == good.step
    torch.testing.assert_close(trainer.state().state_dict, good.state_dict, rtol=0, atol=0)
    assert load_checkpoint(trainer.run / "model.net").step == 5
    assert not list(trainer.run.glob(".*.*"))
    trainer.resume("--steps=7")
    assert trainer.state().step == 7


@pytest.mark.parametrize("target", ["state.pt", "model.net", "smoke.net"])
def test_a_file_that_cannot_be_written_is_named(
    target: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer("--steps=5")
    make, sync, opened = Path.open, os.fsync, [""]

    def open_file(path: Path, *how: Any, **more: Any) -> Any:
        opened.append(path.name)
        return make(path, *how, **more)

    def fsync(handle: int) -> None:
        if opened[-1].startswith(f".{target}."):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=f"cannot write .*{target}: No space left on device"):
        trainer.resume("--steps=9", "--save_every=100")
    # The state is written first: what fails after it loses nothing.
    assert trainer.state().step == (5 if target == "state.pt" else 9)
    assert load_checkpoint(Path("runs/smoke.net")).step == 5


def test_a_poor_file_system(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No modes, owners, times, links nor locks, and no way to ask for writing at once: a share, a bucket."""

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def fsync(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    for name in ("chmod", "fchmod", "chown", "utime", "link", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", refuse)
    trainer("--steps=3")
    trainer.resume("--steps=5", "--save_every=1")
    trainer("--steps=2")
    assert load_checkpoint(Path("runs/smoke.net")).step == 2
    assert load_checkpoint(Path("runs/smoke.1.net")).step == 5


def test_a_current_folder_that_was_removed(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer("--steps=1", f"--model_name={tmp_path / 'm.net'}")
    trainer.run = tmp_path / "runs/smoke_0"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    trainer.resume("--steps=2")
    assert load_checkpoint(tmp_path / "m.net").step == 2


def test_a_model_of_another_training_is_kept(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def models() -> dict[str, int]:
        return {path.name: load_checkpoint(path).step for path in tmp_path.glob("runs/*.net")}

    def save(path: Path, state: Checkpoint) -> None:
        save_model(path, state)
        if path.name == "model.net" and state.step == 4:
            raise RuntimeError("killed between the two models")

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "save_model", save)
        with pytest.raises(RuntimeError, match="killed"):
            trainer("--steps=6", "--save_every=2")
    trainer.resume("--steps=6")  # which replaces models of its own
    assert models() == {"smoke.net": 6}
    out = capsys.readouterr().out
    first = Path("runs/smoke.net").read_bytes()
    with claimed(Path("runs/smoke.net")):
        trainer("--steps=5", "--save_every=1")
    assert Path("runs/smoke.1.net").read_bytes() == first
    notice = "runs/smoke.net is the model of another training, and is kept as runs/smoke.1.net"
    warning = "another training is at work on runs/smoke.net as well"
    assert ("kept" in out, warning in out) == (False, False)
    out = capsys.readouterr().out
    assert out.count(notice) == 1
    assert warning in out.partition("run folder")[0]
    assert not list(Path("runs").glob(".*.lock"))
    log = (tmp_path / "runs/smoke_1/log.txt").read_text()
    assert log.index(notice) < log.index("step 5/")  # at the start
    second = Path("runs/smoke.net").read_bytes()
    trainer.resume("--steps=7")  # of the first: the model is now that of the second
    assert models() == {"smoke.net": 7, "smoke.1.net": 6, "smoke.2.net": 5}
    capsys.readouterr()

    def save_beside(path: Path, state: Checkpoint) -> None:
        save_model(path, state)
        Path("runs/smoke.net").write_bytes(second)  # as if the second went on at the same time

    monkeypatch.setattr(training_state, "save_model", save_beside)
    trainer.resume("--steps=10", "--save_every=1")  # which keeps one copy at most
    assert "kept" not in capsys.readouterr().out
    assert models() == {"smoke.net": 5, "smoke.1.net": 6, "smoke.2.net": 5}


def test_a_full_disk_stops_the_run_that_logs(tmp_path: Path) -> None:
    run = Run.open(tmp_path, "n", None, Training())
    with (run.folder / "log.txt").open("ab") as file:
        file.write(b"\n" * 2_000_000)
    with largest_file(1_000_000), pytest.raises(UserError, match="File too large"), run:
        logging.getLogger("anml").info("one line more")


@pytest.mark.parametrize(("flag", "last"), [("--update_lr=1e30", 0), ("--meta_lr=1e36", 1)])
def test_divergence_stops_with_the_last_finite_state(flag: str, last: int, trainer: Trainer) -> None:
    with pytest.raises(UserError) as ended:
        trainer("--steps=50", flag)
    message = str(ended.value)
    assert message.startswith(f"step {last + 1}: ")
    for named in ("--meta_lr", "--update_lr", "--seed 9", str(Path("runs/smoke_0"))):
        assert named in message
    state = trainer.state()
    assert state.step == last
    assert all(bool(value.isfinite().all()) for value in state.state_dict.values())
    lines = sum(path.read_text().count("\n") for path in trainer.run.glob("metrics.csv"))
    assert lines in (0, last + 1)
    reason, separator, _ = message.partition("; the state before it is in ")
    assert separator
    assert reason in trainer.refused()  # it stood exactly before the step that failed


def test_weights_that_are_not_finite_are_not_saved(trainer: Trainer) -> None:
    with pytest.raises(UserError, match=r"step 2.* not kept: .*not finite"):
        trainer("--steps=9", "--meta_lr=1e39")
    assert not list(Path("runs").rglob("*.net"))


def test_a_crash_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost power"), Run.open(tmp_path, "n", None, Training()):
        raise RuntimeError("lost power")
    assert "ended by RuntimeError: lost power" in (tmp_path / "n_0/log.txt").read_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Run.open(tmp_path, "n", None, Training()) as run, Progress(5, every=2) as progress:
        for loss in (1, 2, 3, 4, 5):
            if progress.advance(loss=loss):
                assert progress.report() > 0
        logging.getLogger("anml").info("above the bar")
    captured, written = capsys.readouterr(), (run.folder / "log.txt").read_text()
    assert ("loss=5" in captured.err) == terminal
    # Means since the line before, so that one odd step does not stand for fifty.
    lines = ["step 2/5 loss 1.5", "step 4/5 loss 3.5", "step 5/5 loss 5"]
    assert all(line in written for line in lines)
    shown = captured.out.splitlines()
    assert [line.split(", ")[0] for line in shown] == [*([] if terminal else lines), "above the bar"]
    assert terminal or shown[2].endswith(", 00:00 left")


EVALUATE = "--dataset glyphs --model ANML.net --test_classes 10 --schedule 3 --lr 0.01 --runs 2 --threads 1"


@pytest.mark.parametrize(
    ("script", "library", "flags"),
    [
        (evaluate_classification, "matplotlib.figure", EVALUATE),
        (evaluate_classification, "scipy.special", EVALUATE),
        (mrcl_classification, "matplotlib.figure", "--dataset glyphs --eval_every 1 --steps 1"),
        (analyze_representation, "matplotlib.figure", EVALUATE.split(" --schedule")[0]),
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
