"""What is read is what runs: the default backend follows every edit of the working copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edits import LAYERS, METHOD, ROOT, RULE

SMALL = ["--dataset=glyphs", "--nm_channels=4", "--pln_channels=6", "--threads=1", "--train_classes=70"]
FOLDERS = ("configs", "datasets", "evaluation", "flags", "model", "utils")


def test_table_of_edits() -> None:
    """Each edit in a process of its own; see `tests.edits`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.edits"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (METHOD, RULE, RULE.replace("-inner_lr", "-0.0 * inner_lr"), "the inner step"),
        (LAYERS, "F.relu(self.norm", "F.gelu(self.norm", "the logits"),
    ],
)
def test_through_the_script(file: str, old: str, new: str, reason: str, tmp_path: Path, cache: Path) -> None:
    """A copy of the tree with an edit: the default prints plain's losses, other ones than without the edit,
    and says why it is plain; `--backend fast` is refused with the same reason."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, tmp_path)

    def train(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "mrcl_classification.py", *SMALL, f"--cache_dir={cache}", *flags]
        command += ["--steps=2", "--log_every=1", "--update_step=4"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    def losses(done: subprocess.CompletedProcess[str]) -> list[str]:
        assert done.returncode == 0, done.stderr
        return [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("step ")]

    before = losses(train())
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace(old, new))
    default = train()
    assert f"backend plain: fast gives other numbers than what is written: {reason}" in default.stdout
    assert losses(default) == losses(train("--backend=plain")) != before
    refused = train("--backend=fast")
    assert refused.returncode == 2
    assert reason in refused.stderr
    assert refused.stderr.count("\n") == 1
