"""Several processes give what one gives: weights, tables, errors."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api as launcher

import evaluate_classification
import mrcl_classification
import pretrain_classification
from model.episodes import sample_trajectory
from model.meta_learner import MetaLearner
from model.modelfactory import build
from model.training_state import load_state
from tests.conftest import TINY, Called, Trainer
from tools import analyze_representation
from utils.distributed import SIZES, Group, join, other_launcher, run_as
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
TINY_EVALUATE = ["--config", str(ROOT / "configs/smoke_evaluate.toml"), "--threads=1"]

# Threads of a group that live on when Python ends may abort the process.
SAYS_WHAT_IS_LEFT = """
import atexit, sys
from torch import distributed

atexit.register(lambda: sys.stderr.write(f"a group is left: {distributed.is_initialized()}\\n"))

from mrcl_classification import main
from utils.errors import run_script

run_script(main)
"""


def torchrun(processes: int, folder: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as that many processes (0: without torchrun, which itself ends with 1 if one fails)."""
    started_by = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *(started_by if processes else []), *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def meta_train(path: Path) -> None:
    """A few float64 steps of four trajectories; rank 0 writes weights and means."""
    group = join(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    net = build("ANML", {"nm_channels": 2, "pln_channels": 3, "num_classes": 8}, generator).double()
    images = torch.randn(8, 20, 1, 28, 28, generator=generator, dtype=torch.float64)
    learner = MetaLearner(
        *(net, images, generator),
        meta_lr=0.01,
        update_lr=0.1,
        rln=7,
        shard=group.shard,
        all_reduce=group.all_reduce,
    )
    results = []
    for _ in range(3):
        trajectories = [sample_trajectory([20] * 8, generator, update_step=4, remember=6) for _ in range(4)]
        results.append(list(learner.step(*trajectories)))
    if group.first:
        torch.save([dict(net.state_dict()), results], path)
    group.leave()


def test_two_processes_of_two_trajectories_give_what_one_of_four_gives(tmp_path: Path) -> None:
    meta_train(tmp_path / "one.pt")
    torchrun(2, tmp_path, __file__, str(tmp_path / "two.pt"))
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_training_goes_on_under_another_number_of_processes(
    trainer: Trainer, cache: Path, tmp_path: Path
) -> None:
    script = str(ROOT / "mrcl_classification.py")
    torchrun(2, tmp_path, script, *TINY, f"--cache_dir={cache}", "--meta_batch=2", "--steps=2")
    trainer.resume("--steps=3")
    torchrun(2, tmp_path, script, "--resume", "runs/smoke_0", "--steps=5")
    trainer.resume("--steps=6")
    trainer("--meta_batch=2", "--steps=6")
    several, one = (load_state(tmp_path / f"runs/smoke_{k}") for k in (0, 1))
    assert several is not None
    assert one is not None
    torch.testing.assert_close(several.state_dict, one.state_dict, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(several.generator, one.generator, rtol=0, atol=0)
    assert steps(tmp_path / "runs/smoke_0") == list(range(1, 7))


def test_a_process_that_dies_ends_the_job(cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SAYS_WHAT_IS_LEFT, encoding="utf-8")
    (tmp_path / "file").touch()
    flags = [*TINY, f"--cache_dir={cache}", "--meta_batch=2", "--processes=2", "--runs_dir=file/x"]
    done = torchrun(0, tmp_path, str(script), *flags, code=2)  # which rank 0 alone finds out
    assert "cannot write the run folder file/x" in done.stderr
    assert done.stderr.count("a group is left: False") == 3  # the launcher and two processes


def test_more_processes_than_trajectories(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mrcl_classification, "join", lambda device: Group(0, 2))
    with pytest.raises(UserError, match=r"^--meta_batch 1 is too few for 2 processes to share$"):
        trainer()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host"}, "WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "SLURM_NTASKS=2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS=2"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8"),
        # One process: of its own, alone, in a shell or a batch script of an allocation.
        ({}, None),
        ({"WORLD_SIZE": "2"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "high", "WORLD_SIZE": "all"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": str(2**32 - 5)}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "7"}, None),
    ],
)
def test_other_launchers(
    environment: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SIZES, *os.environ):
        if name in (*SIZES, "RANK", "WORLD_SIZE") or name.startswith("SLURM_"):
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert other_launcher() == found


def test_processes_that_do_not_know_of_each_other_are_refused(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=r"WORLD_SIZE=2.*torchrun"):
            trainer()
        for script, flag, what in (
            (analyze_representation, "--model=m.net", "analysis"),
            (pretrain_classification, "--dataset=glyphs", "pretraining"),
            (mrcl_classification, "--learner=prototypes", "--learner prototypes"),
        ):
            monkeypatch.setattr(sys, "argv", [script.__name__, flag])
            with pytest.raises(UserError, match=f"^{what} runs in one process"):
                script.main()
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("RANK")
    trainer("--steps=1")


def test_an_error_of_the_group_says_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(*tensors: object) -> None:
        raise RuntimeError(
            "NCCL error: Duplicate GPU\nException raised from x (most recent call first):\nf #0"
        )

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(UserError, match="process 0 stops: NCCL error: Duplicate GPU ") as ended:
        Group(0, 2).largest(1)
    assert "Exception raised" not in str(ended.value)
    for name, value in (("TORCHELASTIC_RUN_ID", "7"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"process 1 stops: .*MASTER_ADDR"):
        join(torch.device("cpu"))


def test_evaluation_gives_the_same_table(
    call: Callable[..., Called], trainer: Trainer, cache: Path, tmp_path: Path
) -> None:
    trainer("--model_name=m.net", "--steps=1")
    flags = [*TINY_EVALUATE, f"--cache_dir={cache}", "--scratch", "--model=m.net", "--runs=3", "--nested"]
    assert call(evaluate_classification, *flags).returncode == 0
    done = torchrun(0, tmp_path, str(ROOT / "evaluate_classification.py"), *flags, "--processes=2")
    assert done.stdout.count("meta-test test %") == 1
    one, two = (tmp_path / f"runs/smoke_evaluate_{k}/results.csv" for k in (0, 1))
    assert one.read_text() == two.read_text()
    assert len(list((tmp_path / "runs").glob("smoke_evaluate_*"))) == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ChildFailedError("script", {0: ProcessFailure(0, 0, -9, "")}), 137, None),
        (ChildFailedError("script", {0: ProcessFailure(0, 0, 143, "")}), 143, None),
        (SignalException("", signal.SIGTERM), 143, None),
        (RuntimeError("no port is free"), None, "--processes 2: no port is free"),
        (None, 0, None),
    ],
)
def test_a_job_ends_with_the_exit_code_of_what_ended_it(
    error: Exception | None, code: int | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*command: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(launcher, "elastic_launch", lambda *_: launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises((SystemExit, UserError)) as ended:
        run_as(2)
    assert ended.value.args == (said or code,)
    run_as(1)  # which starts nothing
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    run_as(2)


if __name__ == "__main__":
    meta_train(Path(sys.argv[1]))
