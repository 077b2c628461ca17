"""What several test files share."""

from __future__ import annotations

import codecs
import csv
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import evaluate_classification
import mrcl_classification
from model.fast.memory import keep_freed_memory
from model.modelfactory import build
from model.training_state import load_state
from utils.errors import run_script
from utils.files import Checkpoint, load_checkpoint

keep_freed_memory()  # or tests at paper widths spend a sixth of their time in page faults

ROOT = Path(__file__).parents[1]
TINY = [
    *("--config", str(ROOT / "configs/smoke.toml"), "--eval_every=0"),
    *("--nm_channels=2", "--pln_channels=2", "--update_step=2", "--log_every=10", "--threads=1"),
]
"""Flags of training steps that take milliseconds."""


def windows(data: bytes) -> bytes:
    """With the line ends of Windows."""
    return re.sub(rb"\r?\n", b"\r\n", data)


EDITORS: dict[str, Callable[[bytes], bytes]] = {
    "lines of Windows": windows,
    "a mark in front": lambda data: codecs.BOM_UTF8 + data,
    "both": lambda data: codecs.BOM_UTF8 + windows(data),
    "UTF-16": lambda data: windows(data).decode().encode("utf-16"),
}
"""What editors and spreadsheets make of a text file's bytes."""


@pytest.fixture(params=EDITORS)
def edited(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    """What another program makes of a file's bytes."""
    return EDITORS[request.param]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of generated characters for all runs of the session: drawing them takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def forget_log_lines() -> Iterator[None]:
    """Scripts that run within this process leave lines for the `log.txt` of a run that does not come."""
    yield
    log = logging.getLogger("anml")
    for handler in list(log.handlers):
        log.removeHandler(handler)


def rows(run: Path) -> list[dict[str, str]]:
    """Of `metrics.csv`, without the column that no two runs share."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(file)]


def curve(run: Path, tag: str = "meta_train/loss") -> list[tuple[int, float]]:
    """Steps and values of a curve, as TensorBoard's server reads them."""
    reader = EventAccumulator(str(run), tensor_size_guidance={"scalars": 0}).Reload()
    return [(point.step, make_ndarray(point.tensor_proto).item()) for point in reader.Tensors(tag)]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, Adam, generator and metrics of two run folders are equal bit for bit."""
    a, b = load_state(first), load_state(second)
    assert a is not None
    assert b is not None
    assert a.step == b.step
    model_a, model_b = (load_checkpoint(run / "model.net").state_dict for run in (first, second))
    for ours, theirs in (
        (a.state_dict, b.state_dict),
        (a.optimizer, b.optimizer),
        (a.generator, b.generator),
        (model_a, model_b),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert rows(first) == rows(second)


class Called(NamedTuple):
    """What a shell would see of a script."""

    returncode: int
    stdout: str
    stderr: str


def process(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, with one thread, to which this project's modules are known."""
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


Run = Callable[..., None]
Evaluate = Callable[[str], Path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script or tool, a module, with flags, in this process and a folder of its own; errors are
    raised."""
    monkeypatch.chdir(tmp_path)

    def start(module: ModuleType, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
        module.main()

    return start


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small untrained models: three of ANML, and one of sANML, OML and Pretrain each."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("ANML", "ANML1", "ANML2", "OML", "Pretrain", "sANML")):
        kind = {"Pretrain": "OML"}.get(name, name.rstrip("12"))
        widths = {"pln_channels": 4, "num_classes": 4 if kind == "sANML" else 20}
        widths |= {"nm_channels": 4} if kind == "ANML" else {}
        net = build(kind, widths, torch.Generator().manual_seed(seed))
        arguments = {"weights": "pretrained"} if name == "Pretrain" else {}
        Checkpoint(kind, net.widths, dict(net.state_dict()), arguments, 0).save(folder / f"{name}.net")
    return folder


@pytest.fixture
def evaluate(models: Path, cache: Path, tmp_path: Path, run: Run) -> Evaluate:
    """Runs an evaluation in this process, beside copies of the models; returns the latest run folder."""
    for path in models.glob("*.net"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def start(flags: str) -> Path:
        run(evaluate_classification, *flags.split(), f"--cache_dir={cache}")
        return max(Path("runs").iterdir(), key=lambda folder: int(folder.name.rpartition("_")[2]))

    return start


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Runs a script or tool, a module, with flags in this process."""

    def run(module: ModuleType, *flags: str) -> Called:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
        code: object = 0
        try:
            run_script(module.main)
        except SystemExit as end:
            code = end.code
        return Called(int(str(code or 0)), *capsys.readouterr())

    return run


class Trainer:
    """Runs the training script in a folder of its own, within this process."""

    def __init__(self, folder: Path, cache: Path, start: Run) -> None:
        self.run, self.flags, self.start = folder / "runs/smoke_0", [*TINY, f"--cache_dir={cache}"], start

    def __call__(self, *flags: str) -> None:
        """Train anew."""
        self.start(mrcl_classification, *self.flags, *flags)

    def resume(self, *flags: str) -> None:
        """Go on with the first run."""
        self.start(mrcl_classification, "--resume", str(self.run), *flags)

    def state(self) -> Checkpoint:
        """The state that the first run would go on from."""
        state = load_state(self.run)
        assert state is not None
        return state


@pytest.fixture
def trainer(tmp_path: Path, cache: Path, run: Run) -> Trainer:
    return Trainer(tmp_path, cache, run)
