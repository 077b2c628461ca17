"""Run folders: what is written, when, and what a crash leaves."""

import logging
import sys
from pathlib import Path

import pytest

from flags.training import Training
from utils.command_line import parse
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
