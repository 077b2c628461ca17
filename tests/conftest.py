"""What several test files share."""

import codecs
import csv
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from filelock import SoftFileLock
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

import evaluate_classification
import mrcl_classification
from datasets import DATASETS
from datasets.images import ImageSet, Pool
from evaluation import plots
from model.check import check_network
from model.fast.memory import keep_freed_memory
from model.modelfactory import NETWORKS, build
from model.scores import CHANGE, CLASSES, MEASURES, RUNS, TENTH
from model.training_state import load_state
from tests.forks import Forks
from utils.errors import run_script
from utils.files import Checkpoint, load_checkpoint

keep_freed_memory()  # or tests at paper widths spend a sixth of their time in page faults

ROOT = Path(__file__).parents[1]
TINY = [
    *("--config", str(ROOT / "configs/smoke.toml"), "--eval_every=0"),
    *("--nm_channels=2", "--pln_channels=2", "--update_step=2", "--log_every=10", "--threads=1"),
    "--backend=plain",
]
"""Flags of training steps that take milliseconds; the guard of the fast backend takes more."""
WIDTHS = ("--nm_channels", "--pln_channels", "--num_classes")

LOAD, GLYPHS = DATASETS["glyphs"], cache(DATASETS["glyphs"])


@wraps(LOAD)
def drawn_once(
    split: str, root: Path, cache_dir: Path, size: int, **options: int
) -> ImageSet | Mapping[str, ImageSet]:
    """Generated characters, which look at no root, shared by all runs within this process; one process draws
    for all."""
    with SoftFileLock(cache_dir / "lock", timeout=60) if cache_dir.exists() else nullcontext():
        return GLYPHS(split, ROOT, cache_dir, size, **options)


CHECKED: set[tuple[object, str]] = set()


def checked_once(name: str, *args: object, **options: object) -> None:
    """`check_network`, but for networks and arguments that have passed it within this process."""
    key = NETWORKS[name], repr((args, options))
    if key not in CHECKED:
        check_network(name, *args, **options)  # type: ignore[arg-type]
        CHECKED.add(key)


def shown(page: str, mark: str) -> str:
    """The code that a page of the documentation shows below a mark."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {mark} -->")[1].split("```")[1].removeprefix("python\n")


def pooled(images: Tensor) -> Pool:
    """The pool of [C, D, ...], C classes of D images."""
    return Pool(images.flatten(0, 1), (images.shape[1],) * len(images))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of the project's log so far, which is then forgotten."""
    found = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return [line for name, level, line in found if (name, level) == ("anml", "WARNING")]


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


@pytest.fixture(scope="session", name="cache")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of generated characters for all runs of the session: drawing them takes seconds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def _quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that run within this process share characters and checks, and draw small figures."""
    monkeypatch.setattr(plots, "DPI", 30)
    monkeypatch.setattr(mrcl_classification, "check_network", checked_once)
    monkeypatch.setitem(DATASETS, "glyphs", drawn_once)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    started = Forks()
    with started.server:
        yield started


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


def score(**values: float) -> dict[str, Any]:
    """A run's value of each measure, but for those given 0, or None where a run may lack one."""
    nothing = {CLASSES: 0, RUNS: 0, CHANGE: None, TENTH: None}
    return {name: nothing.get(measure.kind, 0.0) for name, measure in MEASURES.items()} | values


def curve(run: Path, tag: str = "meta_train/loss") -> list[tuple[int, Any]]:
    """Steps and values of a curve, or a picture, as TensorBoard's server reads them."""
    reader = EventAccumulator(str(run), tensor_size_guidance={"scalars": 0}).Reload()
    return [(point.step, make_ndarray(point.tensor_proto).tolist()) for point in reader.Tensors(tag)]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, Adam, generator and metrics of two run folders are equal bit for bit."""
    states = [load_state(run) for run in (first, second)]
    for part in ("step", "state_dict", "inner_rule", "optimizer", "generator"):
        ours, theirs = (getattr(state, part) for state in states)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    models = (load_checkpoint(run / "model.net").state_dict for run in (first, second))
    torch.testing.assert_close(*models, rtol=0, atol=0)
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
Call = Callable[..., Called]
Evaluate = Callable[[str], Path]


@pytest.fixture
def run(tmp_path: Path, _quick_start: None, monkeypatch: pytest.MonkeyPatch) -> Run:
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
def call(run: Run, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a script or tool, a module, with flags, in this process and a folder of its own."""

    def start(module: ModuleType, *flags: str) -> Called:
        code: object = 0
        try:
            run_script(lambda: run(module, *flags))
        except SystemExit as end:
            code = end.code
        return Called(int(str(code or 0)), *capsys.readouterr())

    return start


class Trainer:
    """Runs the training script in a folder of its own, within this process."""

    def __init__(self, folder: Path, cache: Path, start: Run, call: Call) -> None:
        self.run, self.flags = folder / "runs/smoke_0", [*TINY, f"--cache_dir={cache}"]
        self.start, self.call = start, call

    def __call__(self, *flags: str) -> None:
        """Train anew; with `--checkpoint`, of a network that a model file holds."""
        shape = WIDTHS if "--checkpoint" in flags else ()
        own = [flag for flag in self.flags if flag.partition("=")[0] not in shape]
        self.start(mrcl_classification, *own, *flags)

    def resume(self, *flags: str) -> None:
        """Go on with the first run."""
        self.start(mrcl_classification, "--resume", str(self.run), *flags)

    def refused(self, *flags: str) -> str:
        """The one line that a try to go on with the first run ends with."""
        done = self.call(mrcl_classification, "--resume", str(self.run), *flags)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    def state(self) -> Checkpoint:
        """The state that the first run would go on from."""
        state = load_state(self.run)
        assert state is not None
        return state


@pytest.fixture
def trainer(tmp_path: Path, cache: Path, run: Run, call: Call) -> Trainer:
    return Trainer(tmp_path, cache, run, call)
