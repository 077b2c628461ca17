"""Both scripts as a user runs them: subprocesses on generated characters."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import evaluate_classification
import mrcl_classification
from tests.conftest import ROOT, Run, curve, process, rows
from utils.files import load_checkpoint

TINY = ["--config", str(ROOT / "configs/smoke.toml")]
TINY_EVALUATE = ["--config", str(ROOT / "configs/smoke_evaluate.toml")]


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the smoke config was trained."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mrcl_classification.train([*TINY, f"--cache_dir={cache}", "--threads=1"])
    return folder


def test_training_leaves_a_complete_run_folder(trained: Path) -> None:
    folder = trained / "runs/smoke_0"
    config = json.loads((folder / "config.json").read_text())
    assert (config["arguments"]["update_step"], config["arguments"]["seed"]) == (5, 9)
    assert re.fullmatch("[0-9a-f]{64}", config["data_hash"])
    assert config["versions"]["torch"] == torch.__version__
    assert config["machine"]["threads"] == torch.get_num_threads()
    assert [int(row["step"]) for row in rows(folder)] == [1, 2, 3, 4]
    assert all(0 <= float(row["accuracy_remember"]) <= 1 for row in rows(folder))
    assert "run folder" in (folder / "log.txt").read_text()
    for path in (trained / "runs/smoke.net", folder / "model.net"):
        saved = load_checkpoint(path)
        assert (saved.network, saved.step) == ("ANML", 4)
        assert saved.arguments["update_lr"] == 0.1
    (kept,) = folder.glob("model_*.net")
    assert (kept.name, load_checkpoint(kept).step) == ("model_3.net", 3)


def test_training_curves_in_tensorboard(trained: Path) -> None:
    folder = trained / "runs/smoke_0"
    reader = EventAccumulator(str(folder)).Reload()
    training = ("loss", "accuracy_trajectory", "accuracy_remember", "gate_mean", "steps_per_second")
    tags = {f"meta_train/{name}" for name in training}
    tags |= {f"meta_val/{name}" for name in ("accuracy_test", "accuracy_train", "gate")}
    assert tags <= set(reader.Tags()["tensors"])
    table = reader.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| seed | 9 |" in table
    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["seed"].number_value == 9
    steps, losses = zip(*curve(folder), strict=True)
    assert steps == (1, 2, 3, 4)
    assert losses == pytest.approx([float(row["loss"]) for row in rows(folder)])
    (_, after), (_, before) = (curve(folder, f"meta_train/active_{k}_gate")[-1] for k in ("after", "before"))
    assert 0 < after <= before <= 1


def test_rates_and_draws_as_released(
    trained: Path, run: Run, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--no-freeze", "--split=dataset", "--class-order=dataset", "--test", "--neuromodulation")
    model = ("--lr_search_split=background", f"--model={trained}/runs/smoke.net", f"--cache_dir={cache}")
    run(evaluate_classification, *TINY_EVALUATE, *flags, *model, "--schedule=2", "--runs=1", "--threads=1")
    out = capsys.readouterr().out
    assert "meta-test test %" in out
    assert "meta-training classes, none of those reported on" in out


def shell(folder: Path, line: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `"$@"` is the command; of a pipe, the exit code is the command's."""
    return process(folder, "bash", "-c", f"set -o pipefail; {line}", "bash", *command, **environment)


def test_training_goes_on_whatever_stdout_is(cache: Path, tmp_path: Path) -> None:
    """Without stdin and stderr, and with an encoding and a reader that cannot take what is printed."""
    flags = ("--eval_every=0", "--log_every=1", "--name=zürich", "--backend=plain", f"--cache_dir={cache}")
    training = (sys.executable, str(ROOT / "mrcl_classification.py"), *TINY, *flags, "--threads=1")
    line = '"$@" <&- 2>&- | sed "/run folder/q"'  # which then closes
    done = shell(tmp_path, line, *training, PYTHONIOENCODING="ascii", PYTHONUNBUFFERED="1")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == r"run folder runs/z\xfcrich_0, device cpu"
    log = (tmp_path / "runs/zürich_0/log.txt").read_text(encoding="utf-8")
    assert "run folder runs/zürich_0" in log
    assert [f"step {step}/4 " in log for step in range(1, 5)] == [True] * 4
    assert load_checkpoint(tmp_path / "runs/smoke.net").step == 4


SAYS = "from utils.errors import *; run_script(lambda: say('a table'))"
REFUSES = """
from utils.errors import *

def main():
    raise UserError("there is no file")

run_script(main)
"""


@pytest.mark.parametrize(
    ("line", "program", "code", "error"),
    [
        ('"$@" | true', SAYS, 0, ""),
        ('"$@" >&-', SAYS, 0, ""),
        ('"$@" > /dev/full', SAYS, 2, "-c: error: cannot write to stdout: No space left on device\n"),
        ('"$@"', REFUSES, 2, "-c: error: there is no file\n"),
        ('"$@" 2>&-', REFUSES, 2, ""),
        ('"$@" > /dev/full 2>&1', REFUSES, 2, ""),
    ],
)
def test_output_that_cannot_be_written(
    line: str, program: str, code: int, error: str, tmp_path: Path
) -> None:
    done = shell(tmp_path, line, sys.executable, "-c", program)
    assert (done.returncode, done.stderr) == (code, error)


PATH = [
    "import sys",
    "from pathlib import Path",
    "sys.path.insert(0, str(Path(__file__).resolve().parent))",
]
SCRIPTS = [
    *sorted(path.name for path in ROOT.glob("*_classification.py")),
    *("-m tools." + path.stem for path in ROOT.glob("tools/*.py") if "def main" in path.read_text()),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_begins_and_ends_alike(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins with what must come before torch, and ends with what makes one line of a user's error; its
    help begins with a sentence and an example."""
    name = script.removeprefix("-m ").removesuffix(".py").replace(".", "/")
    parts = name, "tools/__init__" if script.startswith("-m ") else name
    trees = (ast.parse((ROOT / f"{part}.py").read_text(encoding="utf-8")) for part in parts)
    body, start = ([ast.unparse(node) for node in tree.body] for tree in trees)
    assert start[1 : start.index("import anml_start")] == ([] if script.startswith("-m ") else PATH)
    assert body[-1] == "if __name__ == '__main__':\n    run_script(main)"
    module = importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script.removeprefix("-m "), "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    sentence, empty, example, *_ = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert sentence.endswith(".")
    assert not empty
    assert example.startswith(f"    python {script}")
