"""Full disks, folders that cannot be written, training that diverges: what is lost, said and shown."""

import errno
import fcntl
import logging
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flags.training import Training
from model import training_state
from model.training_state import claimed, save_model
from tests.conftest import Trainer
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
    trainer.resume("--steps=7")  # of the first: the model is now that of the second
    assert models() == {"smoke.net": 7, "smoke.1.net": 6, "smoke.2.net": 5}


def test_trainings_that_share_a_model_name_keep_one_copy_each(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer("--steps=2")
    model = Path("runs/smoke.net")
    other = model.read_bytes()

    def save(path: Path, state: Checkpoint) -> None:
        save_model(path, state)
        model.write_bytes(other)  # of a training that goes on at the same time

    monkeypatch.setattr(training_state, "save_model", save)
    trainer("--steps=6", "--save_every=1")
    assert capsys.readouterr().out.count("is kept as") == 1
    assert sorted(path.name for path in Path("runs").glob("*.net")) == ["smoke.1.net", "smoke.net"]


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
    assert terminal or shown[2].endswith(", 0:00:00 left")
