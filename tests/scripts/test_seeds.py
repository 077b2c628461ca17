"""Several seeds by one command: as many runs as by hand, resumed as a whole, tested as one row."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate_classification
from evaluation.results import read_results, summarise
from tests.conftest import ROOT, TINY, Run, Trainer, assert_same_run
from utils.files import load_checkpoint

EACH = ["--seeds", "3", "11", "--jobs=2", "--name=all"]


def test_seeds_are_the_runs_of_each_seed(trainer: Trainer, run: Run) -> None:
    trainer("--steps=3", "--threads=1", *EACH)
    for seed in (3, 11):
        trainer("--steps=3", f"--seed={seed}", f"--name=alone_{seed}")
        assert_same_run(Path(f"runs/alone_{seed}_0"), Path(f"runs/all_0/seed_{seed}_0"))
    said = Path("runs/all_0/log.txt").read_text()
    assert "seed 3: 3, seed 11: 3 of 3 steps" in said
    flags = ["--dataset=glyphs", *trainer.flags[-1:], "--schedule", "3", "--runs=2", "--lr=0.01"]
    run(evaluate_classification, "--model=runs/all_0", "--name=test", *flags)
    rows = read_results(Path("runs/test_0")).rows
    assert [row["model"] for row in rows] == [f"runs/all_0/seed_{n}.net" for n in (3, 3, 11, 11)]
    (line,) = summarise(rows)
    assert line["models"] == 2

    # A training that fails is named, and the other goes on.
    Path("runs/all_0/seed_3_0/state.pt").write_bytes(b"")
    Path("runs/all_0/seed_3_0/state.previous.pt").unlink(missing_ok=True)
    trainer.run = Path("runs/all_0")
    failure = trainer.refused("--steps=4")
    assert re.search(r"error: 1 of 2 trainings failed: seed 3: cannot read .*seed_3_0/state.pt", failure)
    assert load_checkpoint(Path("runs/all_0/seed_11.net")).step == 4


def test_seeds_go_on_after_a_signal(trainer: Trainer) -> None:
    """A signal to the parent ends all, after they have saved."""
    command = [sys.executable, str(ROOT / "mrcl_classification.py"), *trainer.flags, "--steps=40", *EACH]
    process = subprocess.Popen([*command, "--threads=1", "--save_every=5"], stdout=subprocess.DEVNULL)
    state = Path("runs/all_0/seed_11_0/state.pt")
    deadline = time.monotonic() + 60
    while not state.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert all(Path(f"runs/all_0/seed_{seed}.net").exists() for seed in (3, 11))
    trainer.run = Path("runs/all_0")
    assert "--seeds is [3] and was [3, 11]" in trainer.refused("--seeds=3")
    trainer.resume()
    for seed in (3, 11):
        trainer("--steps=40", f"--seed={seed}", f"--name=alone_{seed}")
        assert_same_run(Path(f"runs/alone_{seed}_0"), Path(f"runs/all_0/seed_{seed}_0"))
    before = Path("runs/all_0/seed_3_0/model.net").stat()
    trainer.resume()
    assert Path("runs/all_0/seed_3_0/model.net").stat() == before, "what is complete stays"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--seeds", "1", "2", "--seed=3"], "--seed 3 means nothing with --seeds"),
        (["--seeds", "1", "2", "--model_name=a.net"], "--model_name a.net means nothing with --seeds"),
        (["--seeds", "1", "1"], "--seeds names a seed twice"),
        (["--jobs=2"], "--jobs 2 means nothing with one --seed"),
    ],
)
def test_what_contradicts_seeds_is_refused(trainer: Trainer, flags: list[str], line: str) -> None:
    done = trainer.call(sys.modules["mrcl_classification"], *TINY[:2], *flags)
    assert (done.returncode, line in done.stderr, list(Path().glob("runs/*"))) == (2, True, [])
