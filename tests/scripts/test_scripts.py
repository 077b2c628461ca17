"""Both scripts as a user runs them: subprocesses on generated characters."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate_classification
import mrcl_classification
from utils.checkpoint import load_checkpoint
from utils.start import numbers

ROOT = Path(__file__).parents[2]
TINY = ["--config", str(ROOT / "configs/smoke.toml")]
TINY_EVALUATE = ["--config", str(ROOT / "configs/smoke_evaluate.toml")]


def command(script: str, cache: Path, *flags: str) -> list[str]:
    program = ["-m", script] if script.startswith("tools.") else [str(ROOT / script)]
    return [sys.executable, *program, *flags, f"--cache_dir={cache}", "--threads=1"]


def run(
    script: str, cache: Path, folder: Path, *flags: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` to its end and check the exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(script, cache, *flags),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


Inside = Callable[..., None]


@pytest.fixture
def inside(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """Runs one of the two scripts with its smallest config, in this process."""
    monkeypatch.chdir(tmp_path)

    def start(script: ModuleType, *flags: str) -> None:
        config = TINY if script is mrcl_classification else TINY_EVALUATE
        monkeypatch.setattr(sys, "argv", command(f"{script.__name__}.py", cache, *config, *flags)[1:])
        script.main()

    return start


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the smoke config was trained and evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    run("mrcl_classification.py", cache, folder, *TINY)
    run("evaluate_classification.py", cache, folder, *TINY_EVALUATE)
    return folder


def test_training_leaves_a_complete_run_folder(trained: Path) -> None:
    folder = trained / "runs/smoke_0"
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["update_step"] == 5
    assert config["arguments"]["seed"] == 9
    assert re.fullmatch("[0-9a-f]{64}", config["manifest"])
    assert config["versions"]["torch"] == torch.__version__
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(0 <= float(row["accuracy_remember"]) <= 1 for row in rows)
    assert "run folder" in (folder / "log.txt").read_text()
    for path in (trained / "runs/smoke.net", folder / "model.net"):
        saved = load_checkpoint(path)
        assert (saved.network, saved.step) == ("ANML", 4)
        assert saved.arguments["update_lr"] == 0.1
    (kept,) = folder.glob("model_*.net")
    assert (kept.name, load_checkpoint(kept).step) == ("model_3.net", 3)


def test_training_curves_in_tensorboard(trained: Path) -> None:
    reader = events(trained / "runs/smoke_0")
    tags = reader.Tags()
    assert {
        "meta_train/loss",
        "meta_train/accuracy_trajectory",
        "meta_train/accuracy_remember",
        "meta_train/gate_mean",
        "meta_train/active_before_gate",
        "meta_train/active_after_gate",
        "meta_train/steps_per_second",
        "meta_val/accuracy_test",
        "meta_val/accuracy_train",
    } <= set(tags["scalars"])
    assert "meta_val/gate" in tags["images"]
    assert "arguments/text_summary" in tags["tensors"]
    with (trained / "runs/smoke_0/metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    curve = reader.Scalars("meta_train/loss")
    assert [event.step for event in curve] == [1, 2, 3, 4]
    assert [event.value for event in curve] == pytest.approx(losses)
    before = reader.Scalars("meta_train/active_before_gate")[-1].value
    assert 0 < reader.Scalars("meta_train/active_after_gate")[-1].value <= before <= 1


def test_evaluation_leaves_results(trained: Path) -> None:
    folder = trained / "runs/smoke_evaluate_0"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["classes"], row["run"]) for row in rows] == [
        *(("2", "0"), ("2", "1"), ("3", "0"), ("3", "1")),
    ]
    results = json.loads((folder / "results.json").read_text())
    assert results["rln"] == 13
    assert len(results["search"]) == 4
    for line in results["summary"]:
        assert line["test_low"] <= line["test"] <= line["test_high"]
        runs = [float(row["test"]) for row in rows if int(row["classes"]) == line["classes"]]
        assert line["test"] == pytest.approx(sum(runs) / len(runs))
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    reader = events(folder)
    assert [event.step for event in reader.Scalars("meta_test/accuracy_test")] == [2, 3]
    assert "meta_test/accuracy" in reader.Tags()["images"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--rln", "0"),
        ("--rln", "7", "--iid", "--epoch", "2"),
        ("--no-freeze", "--split", "dataset", "--class-order", "dataset"),
        ("--lr_search_split", "background", "--test", "--neuromodulation"),
        ("--scratch",),
    ],
)
def test_treatments(
    flags: tuple[str, ...], trained: Path, inside: Inside, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(trained / "runs/smoke.net"), "--schedule", "2", "--runs", "1")
    inside(evaluate_classification, *options, *flags)
    out = capsys.readouterr().out
    assert "meta-test test %" in out
    if "background" in flags:
        assert "meta-training classes, none of those reported on" in out


@pytest.mark.parametrize("flags", [("--first_order",), ("--treatment", "OML", "--update_lr=0.03")])
def test_other_methods_train_and_evaluate(
    flags: tuple[str, ...], inside: Inside, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(mrcl_classification, *flags)
    inside(evaluate_classification, "--lr", "0.001", "--schedule", "3")
    assert "learning rate 0.001 as given" in capsys.readouterr().out


def test_same_seed_same_weights(trained: Path, inside: Inside, tmp_path: Path) -> None:
    inside(mrcl_classification, "--eval_every", "0")  # and looking on the way changes nothing
    inside(mrcl_classification, "--seed", "10", "--model_name", "other.net")
    first = load_checkpoint(trained / "runs/smoke.net").state_dict
    again = load_checkpoint(tmp_path / "runs/smoke.net").state_dict
    other = load_checkpoint(tmp_path / "other.net").state_dict
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["pln.block2.conv.weight"], other["pln.block2.conv.weight"])


def test_training_starts_from_a_model_file(trained: Path, inside: Inside, tmp_path: Path) -> None:
    model = str(trained / "runs/smoke.net")
    start = ("--checkpoint", "--saved_model", model, "--steps", "1", "--meta_lr", "1e-12")
    inside(mrcl_classification, *start, "--no-reset", "--model_name", "next.net")
    first = load_checkpoint(Path(model)).state_dict
    second = load_checkpoint(tmp_path / "next.net").state_dict
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


def shell(folder: Path, line: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `"$@"` is the command; of a pipe, the exit code is the command's."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "environment"),
    [
        ('"$@"', {"PYTHONIOENCODING": "ascii"}),
        ('"$@" <&- >&- 2>&-', {}),
        ('"$@" 2>&1 | head -n 1', {"PYTHONUNBUFFERED": "1"}),
    ],
)
def test_training_goes_on_whatever_stdout_is(
    line: str, environment: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    flags = (*TINY, "--eval_every=0", "--log_every=1", "--name=zürich")
    training = command("mrcl_classification.py", cache, *flags)
    done = shell(tmp_path, line, *training, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "runs/zürich_0/log.txt").read_text(encoding="utf-8")
    assert "run folder runs/zürich_0" in log
    assert [f"step {step}/4 " in log for step in range(1, 5)] == [True] * 4
    assert load_checkpoint(tmp_path / "runs/smoke.net").step == 4
    if environment.get("PYTHONIOENCODING") == "ascii":
        assert "run folder runs/z\\xfcrich_0" in done.stdout


@pytest.mark.parametrize(
    ("line", "files"),  # the parser refuses one file, and the script two that are not there
    [('"$@" 2>&-', ["a.csv"]), ('"$@" > /dev/full 2>&1', ["a", "b"])],
)
def test_the_exit_code_does_not_depend_on_stderr(line: str, files: list[str], tmp_path: Path) -> None:
    done = shell(tmp_path, line, sys.executable, "-m", "tools.compare_results", *files)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ('"$@" | true', 0, ""),
        ('"$@" > /dev/full', 2, "cannot write to stdout: No space left on device"),
    ],
)
def test_a_table_that_cannot_be_printed(line: str, code: int, error: str, tmp_path: Path) -> None:
    results = str(ROOT / "results/scratch.csv")
    done = shell(tmp_path, line, sys.executable, "-m", "tools.compare_results", results, results)
    assert done.returncode == code
    assert done.stderr.count("\n") == bool(error)
    assert error in done.stderr


def test_tensorboard_starts_and_shows_the_curves(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", "--port=0", "--logdir=runs"]
    said = tmp_path / "said.txt"
    with said.open("w") as file, subprocess.Popen(command, cwd=trained, stdout=file, stderr=file) as server:
        try:

            def wait_for(what: Callable[[], Any]) -> Any:
                for _ in range(600):
                    assert server.poll() is None, said.read_text()
                    found = what()
                    if found:
                        return found
                    time.sleep(0.1)
                raise AssertionError(said.read_text())

            (url,) = wait_for(lambda: re.findall(r"http://127\.0\.0\.1:\d+/(?= )", said.read_text()))

            def page(path: str, asked: object = None) -> bytes:
                data = None if asked is None else json.dumps(asked).encode()
                request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})  # noqa: S310
                with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 (ours)
                    found: bytes = answer.read()
                    return found

            assert b"<title>TensorBoard</title>" in page("")
            wait_for(lambda: {"smoke_0", "smoke_evaluate_0"} <= set(json.loads(page("data/runs"))))
            curve = "data/plugin/scalars/scalars?run=smoke_0&tag=meta_train/loss"
            assert [step for _, step, _ in json.loads(page(curve))] == [1, 2, 3, 4]
            statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
            asked = {"experimentName": "", "allowedStatuses": statuses, "startIndex": 0, "sliceSize": 9}
            found = json.loads(page("data/plugin/hparams/session_groups", asked))["sessionGroups"]
            lines = {group["name"]: group for group in found}
            assert lines["smoke_0"]["hparams"]["update_lr"] == 0.1
            for run, tag in (
                ("smoke_0", "meta_train/accuracy_remember"),
                ("smoke_evaluate_0", "meta_test/accuracy_test"),
            ):
                assert tag in [value["name"]["tag"] for value in lines[run]["metricValues"]]
            columns = json.loads(page("data/plugin/hparams/experiment", {"experimentName": ""}))
            differing = {column["name"] for column in columns["hparamInfos"] if column["differs"]}
            assert "rln" in differing
            assert "glyph_seed" not in differing
        finally:
            server.terminate()


SCRIPTS = [
    *sorted(path.name for path in ROOT.glob("*.py")),
    *("-m tools." + path.stem for path in ROOT.glob("tools/*.py") if "def main" in path.read_text()),
]
OLD = {
    "torch": "import torch; torch.__version__ = '2.8.0+cpu'; del torch.func.functional_call",
    "scipy": "from importlib import metadata; new = metadata.version\n"
    "metadata.version = lambda name: '1.14.1' if name == 'scipy' else new(name)",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_begins_with_what_must_come_before_torch(script: str) -> None:
    name = script.removeprefix("-m ").removesuffix(".py").replace(".", "/")
    body = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
    first = next(node for node in body if isinstance(node, ast.Import | ast.ImportFrom) and not _future(node))
    assert ast.unparse(first) == "import utils.start"


def _future(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


@pytest.mark.parametrize(
    ("script", "package"), [("-m tools.ledger", "torch"), ("evaluate_classification.py", "scipy")]
)
def test_an_old_release_is_refused_in_one_line(script: str, package: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OLD[package])
    done = subprocess.run(
        [sys.executable, *script.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(rf"error: {package} [\d.]+\S* is too old, [\d.]+ is needed: pip install -r ", line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_a_sentence_and_an_example(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script.removeprefix("-m "), "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    sentence, empty, example, *_ = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert sentence.endswith(".")
    assert not empty
    assert example.startswith(f"    python {script}")


def test_releases_are_compared_by_number() -> None:
    assert numbers("2.10.0a0+git1") > numbers("2.9")
    assert numbers("2.9.0+cpu") >= numbers("2.9")
    assert numbers("2.8.1") < numbers("2.9")
