"""Run folders: what is written, when, and what a crash leaves; and the figures that go there."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation.plots import comparison_figure, save_png
from flags.training import Training
from utils.command_line import parse
from utils.errors import UserError
from utils.run import Progress, Run

log = logging.getLogger("anml")


def arguments(text: str = "") -> Training:
    return parse(Training, text.split())


def test_a_crash_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost power"), Run.open(tmp_path, "n", None, arguments()):
        raise RuntimeError("lost power")
    assert "ended by RuntimeError: lost power" in (tmp_path / "n_0/log.txt").read_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Run.open(tmp_path, "n", None, arguments()) as run, Progress(5, every=2) as progress:
        for loss in (1, 2, 3, 4, 5):
            if progress.advance(loss=loss):
                assert progress.report() > 0
        log.info("above the bar")
    captured, written = capsys.readouterr(), (run.folder / "log.txt").read_text()
    assert ("loss=5" in captured.err) == terminal
    # Means since the line before, so that one odd step does not stand for fifty.
    lines = ["step 2/5 loss 1.5", "step 4/5 loss 3.5", "step 5/5 loss 5"]
    assert all(line in written for line in lines)
    shown = captured.out.splitlines()
    assert [line.split(", ")[0] for line in shown] == [*([] if terminal else lines), "above the bar"]
    assert terminal or shown[2].endswith(", 0:00:00 left")


def test_accuracy_figure(tmp_path: Path) -> None:
    row = {"test": 0.8, "test_low": 0.7, "test_high": 0.9}
    row |= {"train": 0.95, "train_low": 0.9, "train_high": 1.0}
    rows = [{"classes": 50, **row, "lr": 0.001}, {"classes": 10, **row}]
    axes = comparison_figure({"ANML": rows}).axes[0]
    curves = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    assert curves["ANML"].tolist() == [[10, 80], [50, 80]]
    np.testing.assert_allclose(curves["chance"][[0, -1]], [[10, 10], [50, 2]])
    assert {line.get_linestyle() for line in axes.get_lines()} == {"-", ":"}
    save_png(comparison_figure({"ANML": rows[:1]}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.png"):
        save_png(comparison_figure({"ANML": rows}), tmp_path / "file" / "a.png")
