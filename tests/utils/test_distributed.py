"""Several processes give what one gives: weights, tables, errors."""

import signal
import socket
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
from datasets.task_sampler import sample_trajectory
from model.modelfactory import NETWORKS, build
from model.outer_loops import TrajectoryLoop
from model.training_state import load_state
from tests.conftest import ROOT, TINY, WIDTHS, Call, Called, Trainer, pooled, process, rows
from tests.forks import Forks
from tests.networks import OWN
from utils.distributed import Group, is_first, join, launched, run_as
from utils.errors import UserError

TINY_EVALUATE = ["--config", str(ROOT / "configs/smoke_evaluate.toml"), "--threads=1"]

SINGLE = "^--learner iid runs in one process"
SMALL = {"ANML": {"nm_channels": 2, "pln_channels": 3}, "BatchNorm": {"width": 2}}

# Threads of a group that live on when Python ends may abort the process.
SAYS_WHAT_IS_LEFT = """
import atexit, sys
from torch import distributed

atexit.register(lambda: sys.stderr.write(f"a group is left: {distributed.is_initialized()}\\n"))

from mrcl_classification import main
from utils.errors import run_script

run_script(main)
"""


@pytest.fixture
def job(forks: Forks, tmp_path: Path) -> Callable[..., Called]:
    """Runs a module as a job of one process for each list of flags, told of it as Kubernetes would; all end
    with `code`."""

    def run(module: str, *ranks: list[str], code: int = 0) -> Called:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        place = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = [forks.start(tmp_path, module, *f, RANK=str(k), **place) for k, f in enumerate(ranks)]
        codes = [forks.wait(child) for child in children]
        said = [Path(f"{tmp_path}.{name}") for name in ("stdout", "stderr")]
        done = Called(code, *(path.read_text() for path in said))
        for path in said:
            path.unlink()
        assert codes == [code] * len(ranks), done.stderr
        return done

    return run


def main() -> None:
    """A few float64 steps of four trajectories of a network; rank 0 writes weights, buffers and means."""
    name, path = sys.argv[1:]
    NETWORKS.update(OWN)
    group = join(torch.device("cpu"), {})
    generator = torch.Generator().manual_seed(1)
    net = build(name, {"num_classes": 8, **SMALL[name]}, generator).double().train()
    images = torch.randn(8, 20, 1, 28, 28, generator=generator, dtype=torch.float64)
    learner = TrajectoryLoop(net, pooled(images), generator, meta_lr=0.01, group=group)
    results = []
    for step in range(3):
        torch.manual_seed(step)
        trajectories = [sample_trajectory([20] * 8, generator, update_step=4, remember=6) for _ in range(4)]
        results.append(list(learner.step(*trajectories).values()))
    if is_first():
        state = dict(net.state_dict())
        state.pop("trunk.0.bias", None)  # before a norm its gradient is rounding, which Adam scales up
        torch.save([state, results], path)
    group.leave()


@pytest.mark.parametrize("name", SMALL)
def test_two_processes_of_two_trajectories_give_what_one_of_four_gives(
    name: str, job: Callable[..., Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["", name, str(tmp_path / "one.pt")])
    main()
    job(__name__, *([name, str(tmp_path / "two.pt")] for _ in range(2)))
    one, two = (torch.load(tmp_path / f"{which}.pt", weights_only=True) for which in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_training_goes_on_under_another_number_of_processes(
    job: Callable[..., Called], trainer: Trainer, tmp_path: Path
) -> None:
    trainer("--meta_batch=2", "--steps=2")
    done = job("mrcl_classification", *([["--resume", "runs/smoke_0", "--steps=4"]] * 2))
    assert done.stdout.count("run folder") == 1  # rank 0 alone speaks
    trainer.resume("--steps=5")
    trainer("--meta_batch=2", "--steps=5")
    several, one = (load_state(tmp_path / f"runs/smoke_{k}") for k in (0, 1))
    assert several is not None
    assert one is not None
    torch.testing.assert_close(several.state_dict, one.state_dict, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(several.generator, one.generator, rtol=0, atol=0)
    assert [int(row["step"]) for row in rows(tmp_path / "runs/smoke_0")] == list(range(1, 6))


def test_processes_that_differ_are_refused_before_the_first_step(
    job: Callable[..., Called], trainer: Trainer, tmp_path: Path
) -> None:
    trainer("--steps=1", "--model_name=a.net")
    trainer("--steps=2", "--model_name=b.net")
    before = sorted(tmp_path.rglob("*"))
    same = [*trainer.flags, "--meta_batch=2"]
    done = job("mrcl_classification", [*same, "--steps=4"], [*same, "--steps=9", "--meta_lr=0.1"], code=2)
    assert done.stderr.count("differ in --meta_lr (0.001, 0.1), --steps (4, 9): ") == 2
    same = [flag for flag in same if not flag.startswith(WIDTHS)]
    from_model = [[*same, "--checkpoint", f"--saved_model={name}.net"] for name in "ab"]
    assert job("mrcl_classification", *from_model, code=2).stderr.count("differ in weights (") == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_process_that_dies_ends_the_job(cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SAYS_WHAT_IS_LEFT, encoding="utf-8")
    (tmp_path / "file").touch()
    flags = [*TINY, f"--cache_dir={cache}", "--meta_batch=2", "--processes=2", "--runs_dir=file/x"]
    done = process(tmp_path, sys.executable, str(script), *flags)
    assert done.returncode == 2, done.stderr  # for a reason that rank 0 alone finds out
    assert "cannot write the run folder file/x" in done.stderr
    assert done.stderr.count("a group is left: False") == 3  # the launcher and two processes


def test_more_processes_than_trajectories(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mrcl_classification, "join", lambda *_: Group(0, 2))
    with pytest.raises(UserError, match=r"^--meta_batch 1 is too few for 2 processes to share$"):
        trainer()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host"}, SINGLE),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "7"}, SINGLE),
        # It would else run without a word and write nothing, since it is not rank 0.
        ({"RANK": "1", "WORLD_SIZE": "1"}, r"^RANK is 1 and WORLD_SIZE 1: "),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, None),
        ({"WORLD_SIZE": "2"}, None),
        ({"RANK": "high", "WORLD_SIZE": "all"}, None),
    ],
)
def test_what_makes_a_job(
    environment: dict[str, str], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if says is not None:
        with pytest.raises(UserError, match=says):
            mrcl_classification.train(learner="iid")
        if says is SINGLE:
            with pytest.raises(UserError, match=r"--seeds"):
                mrcl_classification.train(seeds=[1, 2])
        return
    assert join(torch.device("cpu"), {}) == Group()
    assert launched() == (environment.get("RANK") == "0")


def test_an_error_of_the_group_says_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(*tensors: object) -> None:
        raise RuntimeError("NCCL error: Duplicate GPU\nException raised from x (most recent call first):\n#0")

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(UserError, match=r"^process 0 stops: NCCL error: Duplicate GPU \(if that"):
        Group(0, 2).all_reduce([torch.zeros(1)])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_as(2)  # which starts nothing within a job
    with pytest.raises(UserError, match=r"process 1 stops: .*MASTER_ADDR"):
        join(torch.device("cpu"), {})


def test_evaluation_gives_the_same_table(
    job: Callable[..., Called], call: Call, trainer: Trainer, cache: Path, tmp_path: Path
) -> None:
    trainer("--model_name=m.net", "--steps=1")
    flags = [*TINY_EVALUATE, f"--cache_dir={cache}", "--scratch", "--model=m.net", "--runs=3", "--nested"]
    flags += ["--backend=plain"]
    assert call(evaluate_classification, *flags).returncode == 0
    assert job("evaluate_classification", flags, flags).stdout.count("meta-test test %") == 1
    one, two = (tmp_path / f"runs/smoke_evaluate_{k}/results.csv" for k in (0, 1))
    assert one.read_text() == two.read_text()
    assert len(list((tmp_path / "runs").glob("smoke_evaluate_*"))) == 2


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (ChildFailedError("script", {0: ProcessFailure(0, 0, -9, "")}), 137),
        (SignalException("", signal.SIGTERM), 143),
        (RuntimeError("no port is free"), "--processes 2: no port is free"),
    ],
)
def test_a_job_ends_as_what_ended_it(
    error: Exception, ending: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elastic_launch(config: launcher.LaunchConfig, program: str) -> Callable[..., None]:
        assert config.local_addr == "127.0.0.1"  # the machine's own name may have no address

        def launch(*command: str) -> None:
            raise error

        return launch

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises((SystemExit, UserError)) as ended:
        run_as(2)
    assert ended.value.args == (ending,)
