"""Run folders: what is written, when, and what a crash leaves; and the figures that go there."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from evaluation.plots import accuracy_figure, figure_pixels, gate_figure, save_png
from flags.training import Training
from tests.conftest import curve
from utils.command_line import parse
from utils.errors import UserError
from utils.run import Run, log_to_terminal

log = logging.getLogger("anml")
ROOT = Path(__file__).parents[2]


def arguments(text: str = "") -> Training:
    return parse(Training, text.split())


def test_everything_is_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_terminal()
    log.info("before the run")
    asked = arguments("--seed 4 --seeds 1")
    with Run.open(tmp_path / "a", "n", None, asked, {"data_hash": "abc", "device": "cpu"}) as run:
        log.info("within")
        run.metrics({"step": 1, "loss": 0.5})
        run.metrics({"step": 2, "loss": 0.25})
        run.scalars(1, {"meta_train/loss": 0.5, "meta_train/rate": 3.0})
        run.scalars(2, {"meta_train/loss": 0.25})
        run.image("gates", figure_pixels(gate_figure(np.eye(3), [5, 6, 7])), 2)
    log.info("after")

    assert run.folder == tmp_path / "a" / "n_0"
    config = json.loads((run.folder / "config.json").read_text())
    assert config["arguments"]["seed"] == 4
    assert config["arguments"]["dataset_path"] == str(Path("data").resolve())
    assert (config["data_hash"], config["device"]) == ("abc", "cpu")
    assert config["versions"]["torch"] == torch.__version__
    assert config["machine"]["threads"] == torch.get_num_threads()
    with (run.folder / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["1", "0.5"], ["2", "0.25"]]
    text = (run.folder / "log.txt").read_text()
    lines = [line.split(" ", 3)[2:] for line in text.splitlines()]
    assert lines == [
        ["INFO", "before the run"],
        ["WARNING", "--seeds has no effect: give one seed with --seed"],
        ["INFO", "within"],
    ]
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "before the run",
        "warning: --seeds has no effect: give one seed with --seed",
        "within",
        "after",
    ]

    assert curve(run.folder) == [(1, 0.5), (2, 0.25)]
    reader = EventAccumulator(str(run.folder)).Reload()
    assert reader.Tensors("gates")[0].step == 2
    table = reader.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| seed | 4 |" in table
    plugin = HParamsPluginData.FromString(
        reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    )
    assert plugin.session_start_info.hparams["seed"].number_value == 4


def test_a_crash_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost power"), Run.open(tmp_path, "n", None, arguments()):
        raise RuntimeError("lost power")
    assert "ended by RuntimeError: lost power" in (tmp_path / "n_0/log.txt").read_text()


def test_points_are_on_disk_before_the_end(tmp_path: Path) -> None:
    with Run.open(tmp_path, "n", None, arguments()) as run:
        run.metrics({"step": 1})
        run.scalars(1, {"loss": 2.0})
        assert (run.folder / "metrics.csv").read_text().split() == ["step", "1"]
        assert curve(run.folder, "loss") == [(1, 2.0)]
        with pytest.raises(ValueError, match="columns"):
            run.metrics({"epoch": 1})


def test_the_smallest_free_number(tmp_path: Path) -> None:
    (tmp_path / "n_0").mkdir()
    (tmp_path / "n_1").write_text("a file takes a name as well")
    (tmp_path / "n_3").mkdir()
    with Run.open(tmp_path, "n", None, arguments()) as run:
        assert run.folder.name == "n_2"


def test_the_commit_is_recorded(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    with Run.open(tmp_path, "n", None, arguments()) as run:
        found = json.loads((run.folder / "config.json").read_text())["git"]
    head = git("rev-parse", "HEAD")  # a copy without a repository has none
    assert found == ({"commit": head, "dirty": bool(git("status", "--porcelain"))} if head else None)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Run.open(tmp_path, "n", None, arguments()) as run, run.progress(5, every=2) as progress:
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
    axes = accuracy_figure(rows).axes[0]
    curves = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    assert curves["meta-test test (unseen images)"].tolist() == [[10, 80], [50, 80]]
    np.testing.assert_allclose(curves["chance"][[0, -1]], [[10, 10], [50, 2]])
    assert {line.get_linestyle() for line in axes.get_lines()} == {"-", "--", ":"}
    save_png(accuracy_figure(rows[:1]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.png"):
        save_png(accuracy_figure(rows), tmp_path / "file" / "a.png")


def test_gate_figure_shows_the_gates() -> None:
    dark, bright = (figure_pixels(gate_figure(np.full((2, 9), gate), [1, 2])) for gate in (0, 1))
    assert dark.shape == bright.shape
    assert dark.shape[2] == 3
    middle = dark.shape[0] // 2, dark.shape[1] // 3
    assert dark[middle].tolist() == [0, 0, 0]
    assert bright[middle].tolist() == [255, 255, 255]
