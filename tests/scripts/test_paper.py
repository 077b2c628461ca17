"""configs/paper.sh: its commands are ones that the scripts accept, and it skips what is there."""

import csv
import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from flags.common import DataFlags, RunFlags
from flags.evaluation import Evaluation
from flags.training import Training
from tests.conftest import ROOT, process
from tests.tools.test_ledger import write_accuracies
from tools.analyze_representation import Analysis
from tools.compare_results import Comparison
from tools.ledger import Ledger, ledger, read_targets
from tools.plot_results import Plot
from utils.command_line import parse, recorded
from utils.flag import Flags

KINDS: dict[str, type[Flags]] = {
    "mrcl_classification.py": Training,
    "evaluate_classification.py": Evaluation,
    "tools/analyze_representation.py": Analysis,
    "tools/plot_results.py": Plot,
    "tools/compare_results.py": Comparison,
    "tools/ledger.py": Ledger,
}
TIME = re.compile(r"a day|(less than )?[\d.]+( to \d+)? (s|min|h)\b")

# Stands for Python: notes its arguments and makes the model that it is asked for.
FAKE = """#!/bin/sh
echo "$@" >> calls
case "$*" in *"$FAIL_AT"*) exit 130 ;; esac
while [ $# -gt 0 ]; do
  if [ "$1" = --model_name ]; then echo weights > "$2"; fi
  shift
done
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the script, the targets, an earlier result and the configs, and an interpreter that
    only takes notes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results/targets.csv", tmp_path / "results/targets.csv")
    (tmp_path / "results/manifest.csv").write_text("result,training,command\nanml,earlier,c\n")
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


def paper(project: Path, *words: str, fail_at: str = "nothing") -> subprocess.CompletedProcess[str]:
    script = ("bash", str(project / "configs/paper.sh"))
    return process(project.parent, *script, *words, PYTHON="./fake", ROOT="some data", FAIL_AT=fail_at)


def calls(project: Path) -> list[str]:
    path = project / "calls"
    return path.read_text().splitlines() if path.exists() else []


def listed(project: Path) -> dict[str, list[str]]:
    """The commands that a dry run lists, by step."""
    assert os.access(project / "configs/paper.sh", os.X_OK)
    done = paper(project, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = {}
    for heading, command in zip(lines[::2], lines[1::2], strict=True):
        name, time = heading.removeprefix("# ").split(": ", 1)
        assert TIME.match(time), heading
        steps[name] = shlex.split(command)
    return steps


def test_every_command_is_accepted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run lists commands of scripts that are there, of every target, and runs none. What a command
    reads, an earlier one writes."""
    monkeypatch.chdir(project)
    before = sorted(project.rglob("*"))
    steps = listed(project)
    assert sorted(project.rglob("*")) == before
    assert {target.result for target in read_targets()} <= set(steps)
    there: set[str] = set()
    for name, words in steps.items():
        _, script, *flags = words
        if script == "-m":
            script = f"{flags.pop(0).replace('.', '/')}.py"
        assert (ROOT / script).is_file(), name
        if script == "tools/convert_released.py":
            there.add(flags[1])
            continue
        parsed = parse(KINDS[script], flags)
        assert not parsed.notices, name
        if isinstance(parsed, DataFlags):
            assert parsed.dataset_path.parts[0] in ("some data", "fonts")
        if isinstance(parsed, RunFlags):
            assert recorded(parsed)["name"] == f"paper_{name}"
        for flag, value in pairwise(words):
            if flag == "--model":
                assert {value, str(Path(value).parent)} & there, name
            if flag == "--model_name":
                there.add(value.removeprefix("partial_"))
        for folder in (word.rpartition("=")[2] for word in words):
            if folder.startswith("runs/"):
                assert {folder, str(Path(folder).parent)} & there, name
        there.add(f"runs/paper_{name}_0")


def test_steps_run_in_order_and_only_once(project: Path) -> None:
    for word, message in (("anlm", "no step anlm"), ("--dry", "no option --dry")):
        done = paper(project, "train_anml", word)
        assert (done.returncode, done.stderr.count("\n"), calls(project)) == (2, 1, [])
        assert message in done.stderr
    assert paper(project, "anml", "train_anml").returncode == 0
    first, second = calls(project)
    assert first.startswith("mrcl_classification.py --config configs/anml.toml")
    assert second.startswith("evaluate_classification.py --name paper_anml ")
    assert (project / "Neuromodulation_Model.net").exists()
    assert not list(project.glob("partial_*"))
    done = paper(project, "train_anml")
    assert "skipped: there is Neuromodulation_Model.net" in done.stdout
    assert len(calls(project)) == 2


def test_an_interrupted_step_ends_the_script_and_is_not_taken_as_done(project: Path) -> None:
    (project / "partial_OML_Model.net").write_text("weights on the way")
    assert paper(project, "train_oml", "oml", fail_at="configs/oml.toml").returncode == 130
    assert len(calls(project)) == 1
    assert not (project / "OML_Model.net").exists()
    (project / "runs/paper_train_oml_0").mkdir(parents=True)
    assert paper(project, "train_oml").returncode == 0
    assert calls(project)[-1].endswith("--resume runs/paper_train_oml_0")
    assert (project / "OML_Model.net").exists()
    # An evaluation's folder from an earlier attempt is continued; a finished one is left alone.
    (project / "runs/paper_oml_0").mkdir(parents=True)
    assert paper(project, "oml").returncode == 0
    assert calls(project)[-1].endswith("--resume runs/paper_oml_0")
    (project / "runs/paper_oml_0/accuracy.png").write_text("")
    assert paper(project, "oml").returncode == 0
    assert len(calls(project)) == 3


def test_results_go_to_the_ledger_with_their_commands(project: Path) -> None:
    for name in ("anml", "anml_unlimited"):
        write_accuracies(project / f"runs/paper_{name}_0", "results", {10: (0.8, 0.9)})
    analysis = project / "runs/paper_representation_first_order_10"
    analysis.mkdir()
    (analysis / "representation.json").write_text('{"measured": {"dead": 0}}')
    for _ in range(2):  # a second time replaces the first
        assert paper(project, "ledger").returncode == 0
    assert calls(project) == ["-m tools.ledger"] * 2
    # There is no target for anml_unlimited.
    assert {path.name for path in (project / "results").iterdir()} == {
        *("anml.csv", "manifest.csv", "representation_first_order.json", "targets.csv"),
    }
    with (project / "results/manifest.csv").open(newline="") as file:
        rows = {row["result"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"anml", "representation_first_order"}
    assert rows["anml"]["training"] == "20,000 steps, second order, seed 9"
    assert shlex.split(rows["anml"]["command"]) == listed(project)["anml"][:-2]
    tables = ledger(project / "results")
    assert "| 80.0 ± 12.7 / - / - / - / - |" in tables
    assert "| 20,000 steps, second order, seed 9 | `./fake evaluate_classification.py " in tables
