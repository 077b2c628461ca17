"""Several seeds by one command: as many runs as by hand, resumed as a whole, tested as one row."""

import re
import signal
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import evaluate_classification
from evaluation.results import read_results, summarise
from tests.conftest import TINY, Run, Trainer, assert_same_run
from tests.forks import Forks
from utils import jobs
from utils.files import load_checkpoint

FOLDER = Path("runs/all_0")
RUNS, MODELS = ([FOLDER / f"seed_{seed}{end}" for seed in (3, 11)] for end in ("_0", ".net"))


def test_seeds_are_the_runs_of_each_seed(
    trainer: Trainer, run: Run, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after their parent was killed, and after a signal that it passes on."""
    flags = [*trainer.flags, "--steps=30", "--threads=1", "--seeds", "3", "11", "--jobs=2", "--name=all"]
    parent = forks.start(tmp_path, "mrcl_classification", *flags, "--save_every=5")
    forks.kill_when(lambda: all((run / "state.pt").exists() for run in RUNS), parent)
    for model, folder in zip(MODELS, RUNS, strict=True):
        with FileLock(folder / ".lock", timeout=60):  # the training ends by itself
            assert load_checkpoint(model).step < 30, "too fast for this test"

    sent: list[int] = []

    def tell(parent: Path, seeds: list[int], steps: int, begun: int, seconds: float) -> None:
        if not sent and all(jobs.steps_done(FOLDER, seed) > begun // 2 for seed in (3, 11)):
            sent.append(begun)
            signal.raise_signal(signal.SIGTERM)

    trainer.run = FOLDER
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_tell", tell)
        patch.setattr(jobs, "TOLD_EVERY", 0)
        patch.setattr(jobs, "POLL", 0.01)
        with pytest.raises(SystemExit) as ended:
            trainer.resume()
    assert ended.value.code == 128 + signal.SIGTERM
    assert sum(load_checkpoint(model).step for model in MODELS) > sent[0]
    assert "--seeds is [3] and was [3, 11]" in trainer.refused("--seeds=3")
    trainer.resume()
    before = MODELS[1].stat().st_mtime_ns
    trainer.resume()
    assert MODELS[1].stat().st_mtime_ns == before, "what is complete stays"
    assert "seed 3: 30, seed 11: 30 of 30 steps" in (FOLDER / "log.txt").read_text()
    for seed, folder in zip((3, 11), RUNS, strict=True):
        trainer("--steps=30", f"--seed={seed}", f"--name=alone_{seed}")
        assert_same_run(Path(f"runs/alone_{seed}_0"), folder)

    test = ["--dataset=glyphs", *trainer.flags[-1:], "--schedule", "3", "--runs=2", "--lr=0.01"]
    run(evaluate_classification, f"--model={FOLDER}", "--name=test", *test)
    rows = read_results(Path("runs/test_0")).rows
    assert [row["model"] for row in rows] == [str(model) for model in MODELS for _ in range(2)]
    assert [line["models"] for line in summarise(rows)] == [2]

    # A training that fails is named, and the other goes on.
    (RUNS[0] / "state.pt").write_bytes(b"")
    (RUNS[0] / "state.previous.pt").unlink()
    failure = trainer.refused("--steps=31")
    assert re.search(r"error: 1 of 2 trainings failed: seed 3: cannot read .*seed_3_0/state.pt", failure)
    assert load_checkpoint(MODELS[1]).step == 31


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
