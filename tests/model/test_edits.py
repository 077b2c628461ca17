"""What is read is what runs: the default backend follows every edit of the working copy."""

import re
import shutil
import sys
from pathlib import Path

import mrcl_classification
from tests.conftest import ROOT, Call, process
from tests.edits import METHOD, RULE

SMALL = "--dataset=glyphs --nm_channels=4 --pln_channels=6 --threads=1 --train_classes=70 --steps=2"
FOLDERS = ("configs", "datasets", "evaluation", "flags", "model", "utils")
TWICE = """
import sys
from mrcl_classification import main
from utils.errors import run_script

run_script(main)
sys.argv.append("--backend=fast")
run_script(main)
"""


def test_table_of_edits() -> None:
    """Each edit in a process of its own; see `tests.edits`."""
    done = process(ROOT, sys.executable, "-m", "tests.edits")
    assert done.returncode == 0, done.stdout + done.stderr


def test_through_the_script(call: Call, tmp_path: Path, cache: Path) -> None:
    """A copy of the tree with an edit: the default prints other losses than without the edit, and says why it
    is plain; `--backend fast` is refused with the reason."""
    flags = [*SMALL.split(), "--log_every=1", "--update_step=4", f"--cache_dir={cache}"]
    before = call(mrcl_classification, *flags, "--name=before", f"--runs_dir={tmp_path}")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, tmp_path)
    path = tmp_path / METHOD
    path.write_text(path.read_text().replace(RULE, RULE.replace("-inner_lr", "-0.0 * inner_lr")))
    done = process(tmp_path, sys.executable, "-c", TWICE, *flags, PYTHONPATH="")
    reason = "fast gives other numbers than what is written: the inner step"
    assert f"backend plain: {reason}" in done.stdout
    losses = [re.findall(r"^step \d+/2 loss \S+", said.stdout, re.M) for said in (done, before)]
    assert losses[0] != losses[1]
    assert [len(found) for found in losses] == [2, 2]
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--backend fast: {reason}" in done.stderr
