"""Several seeds by one command: as many runs as by hand, resumed as a whole, tested as one row."""

import re
import signal
from pathlib import Path

import pytest
from filelock import FileLock

import evaluate_classification
from evaluation.results import read_results, summarise
from tests.conftest import Run, Trainer, assert_same_run
from tests.forks import Forks
from utils import jobs
from utils.files import load_checkpoint

FOLDER = Path("runs/all_0")
RUNS, MODELS = ([FOLDER / f"seed_{seed}{end}" for seed in (3, 11)] for end in ("_0", ".net"))


def test_seeds_are_the_runs_of_each_seed(
    trainer: Trainer, run: Run, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after their parent was killed, one failed, and a signal that the parent passes on."""
    flags = [*trainer.flags, "--steps=30", "--threads=1", "--seeds", "3", "11", "--jobs=2", "--name=all"]
    parent = forks.start(tmp_path, "mrcl_classification", *flags, "--save_every=5")
    forks.kill_when(lambda: all((run / "state.pt").exists() for run in RUNS), parent)
    for model, folder in zip(MODELS, RUNS, strict=True):
        with FileLock(folder / ".lock", timeout=60):  # the training ends by itself
            assert load_checkpoint(model).step < 30, "too fast for this test"

    trainer.run = FOLDER
    assert "--seeds is [3] and was [3, 11]" in trainer.refused("--seeds=3")

    # A training that fails is named, and the other goes on.
    state = (RUNS[0] / "state.pt").read_bytes()
    for name in ("state.pt", "state.previous.pt"):
        (RUNS[0] / name).write_bytes(b"")
    failure = trainer.refused()
    assert re.search(r"error: 1 of 2 trainings failed: seed 3: cannot read .*seed_3_0/state.pt", failure)
    assert load_checkpoint(MODELS[1]).step == 30
    (RUNS[0] / "state.pt").write_bytes(state)
    sent: list[int] = []
    written, done = MODELS[1].stat().st_mtime_ns, load_checkpoint(MODELS[0]).step

    def tell(parent: Path, seeds: list[int], steps: int, begun: int, seconds: float) -> None:
        if not sent and jobs.steps_done(FOLDER, 3) > done:
            sent.append(done)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_tell", tell)
        patch.setattr(jobs, "TOLD_EVERY", 0)
        patch.setattr(jobs, "POLL", 0.01)
        with pytest.raises(SystemExit) as ended:
            trainer.resume()
    assert ended.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(MODELS[0]).step > done
    trainer.resume()
    assert MODELS[1].stat().st_mtime_ns == written, "what is complete stays"
    assert "seed 3: 30, seed 11: 30 of 30 steps" in (FOLDER / "log.txt").read_text()
    for seed, folder in zip((3, 11), RUNS, strict=True):
        trainer("--steps=30", f"--seed={seed}", f"--name=alone_{seed}")
        assert_same_run(Path(f"runs/alone_{seed}_0"), folder)

    test = ["--dataset=glyphs", *trainer.flags[-1:], "--schedule", "3", "--runs=2", "--lr=0.01"]
    run(evaluate_classification, f"--model={FOLDER}", "--name=test", *test)
    rows = read_results(Path("runs/test_0")).rows
    assert [row["model"] for row in rows] == [str(model) for model in MODELS for _ in range(2)]
    assert [line["models"] for line in summarise(rows)] == [2]
