"""Runs that are killed, stopped or damaged go on as if nothing had happened, or say why not."""

import fcntl
import json
import logging
import os
import random
import re
import select
import signal
import struct
import termios
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import evaluate_classification
from datasets.task_sampler import Trajectory, sample_trajectory
from evaluation.results import read_results, summarise
from model import outer_loops
from model.training_state import NAME, load_state
from tests.conftest import EDITORS, ROOT, Run, Trainer, assert_same_run, curve, rows
from tests.forks import Forks
from utils import jobs
from utils.distributed import Interrupt
from utils.files import load_checkpoint

STEPS, KILLS = 40, 4
ROWS = 8  # new rows of metrics.csv before a kill, at most
LATE = 0.03  # seconds after them, at most: longer than a step, and than saving one


def test_kills_change_nothing(trainer: Trainer, forks: Forks, tmp_path: Path) -> None:
    flags = [f"--steps={STEPS}", "--save_every=3"]
    trainer(*flags)
    whole, folder, moments = trainer.run.resolve(), tmp_path / "killed", random.Random(1)
    folder.mkdir()

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/*/metrics.csv"))

    def start() -> int:
        resume = [f"--resume={path.parent}" for path in sorted(folder.glob("runs/*/config.json"))[-1:]]
        return forks.start(folder, "mrcl_classification", *trainer.flags, *flags, *resume)

    for _ in range(KILLS):
        wanted = min(lines() + moments.randint(0, ROWS), STEPS)
        forks.kill_when(partial(lambda n: lines() >= n, wanted), start(), moments.uniform(0, LATE))
    assert forks.wait(start()) == 0
    assert "Traceback" not in Path(f"{folder}.stderr").read_text()
    killed = sorted(folder.glob("runs/*/config.json"))[-1].parent
    resumed = [entry["step"] for entry in json.loads((killed / "config.json").read_text())["resumed"]]
    assert resumed == sorted(resumed)
    assert len(set(resumed)) > 1, "hardly any kill met a run that had come further"
    assert_same_run(whole, killed)
    assert [int(row["step"]) for row in rows(killed)] == list(range(1, STEPS + 1))
    points = curve(killed)
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert set(points) <= set(curve(whole))
    assert not list(killed.glob(".*.*")), "drafts are left"


def test_a_run_from_weights_does_not_repeat_the_draws_that_made_them(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trajectories, head rows and layers; all of a chain of runs draw anew, and each the same again."""
    drawn: list[tuple[int, bytes]] = []

    def spy(sizes: Sequence[int], generator: torch.Generator, **options: int) -> Trajectory:
        if generator.initial_seed() != torch.Generator().initial_seed():  # that of a draw on trial
            drawn.append((torch.initial_seed(), generator.get_state().numpy().tobytes()))
        return sample_trajectory(sizes, generator, **options)

    monkeypatch.setattr(outer_loops, "sample_trajectory", spy)
    trainer("--steps=2", "--name=first", "--seed=3")
    assert drawn[0] == (3 * 2**32 + 1, torch.Generator().manual_seed(3).get_state().numpy().tobytes())
    again = ("--checkpoint", "--seed=3")
    trainer("--steps=2", "--name=next", *again, "--saved_model=runs/first_0/model.net")
    trainer("--steps=2", "--name=last", *again, "--saved_model=runs/next_0/model.net")
    assert len(drawn) == 6
    assert all(len(set(part)) == 6 for part in zip(*drawn, strict=True))

    trainer.run = Path("runs/next_0")
    trainer.resume("--steps=3")
    trainer("--steps=3", "--name=whole", *again, "--saved_model=runs/first_0/model.net")
    assert_same_run(Path("runs/next_0"), Path("runs/whole_0"))
    assert drawn[6:] == [drawn[9], *drawn[2:4], drawn[9]]
    other = ("--seed=4", "--steps=1", "--name=other", "--meta_lr=1e-12", "--no-reset")
    trainer("--checkpoint", "--saved_model=runs/first_0/model.net", *other)
    assert drawn[-1] not in drawn[:-1]
    first, last = (
        load_checkpoint(Path(f"runs/{name}_0/model.net")).state_dict for name in ("first", "other")
    )
    torch.testing.assert_close(first, last, rtol=0, atol=1e-9)


@pytest.fixture
def _default_handlers() -> Iterator[None]:
    """What a process in the foreground begins with; nohup and a shell's `&` have it ignore some signals."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, hangup)
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.usefixtures("_default_handlers")
def test_a_signal_saves_and_the_run_goes_on(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(sizes: Sequence[int], generator: torch.Generator, **options: int) -> Trajectory:
        if torch.initial_seed() % 2**32 == 4:  # in the middle of step 4
            signal.raise_signal(signal.SIGINT)
        return sample_trajectory(sizes, generator, **options)

    with monkeypatch.context() as patch:
        patch.setattr(outer_loops, "sample_trajectory", sample)
        with pytest.raises(SystemExit) as ended:
            trainer("--steps=100000")
    assert ended.value.code == 128 + signal.SIGINT
    assert len(rows(trainer.run)) == 4 == load_checkpoint(Path("runs/smoke.net")).step
    trainer.resume("--steps=7", "--eval_every=2", "--eval_classes=2")  # which changes nothing
    trainer("--steps=7")
    assert_same_run(tmp_path / "runs/smoke_1", trainer.run)


def test_a_closed_terminal_saves(trainer: Trainer, forks: Forks, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and what is printed after it fails."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    flags = [*trainer.flags, "--steps=100000", "--log_every=1"]
    training = forks.start(tmp_path, "mrcl_classification", *flags, TTY=os.ttyname(theirs))
    while select.select([ours], [], [], 60)[0] and b"loss=" not in os.read(ours, 1000):
        pass
    os.close(ours)
    assert forks.wait(training) == 129
    os.close(theirs)
    assert trainer.state().step == len(rows(trainer.run))
    assert "model written to" in (trainer.run / "log.txt").read_text()


@pytest.mark.usefixtures("_default_handlers")
@pytest.mark.parametrize(
    ("place", "numbers", "first"),
    [
        ("terminal", [signal.SIGTERM], signal.SIGTERM),
        ("terminal", [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP], signal.SIGHUP),
        ("job", [signal.SIGTERM, signal.SIGINT], signal.SIGTERM),
        ("nohup", [signal.SIGHUP], 0),
    ],
)
def test_signals_within_an_interrupt(
    place: str, numbers: list[signal.Signals], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "job":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.SIG_IGN if place == "nohup" else signal.SIG_DFL
    signal.signal(signal.SIGHUP, before)
    with Interrupt() as interrupt:
        for number in numbers:
            signal.raise_signal(number)
        if place == "terminal":  # the next one acts
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == first
    assert signal.getsignal(signal.SIGHUP) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [cut, alter, Path.unlink])
def test_a_damaged_state_is_replaced_by_the_one_before(
    damage: Callable[[Path], None], trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer("--steps=7", "--save_every=2")
    trainer("--steps=9")
    damage(trainer.run / "state.pt")
    assert trainer.state().step == 6
    trainer.resume("--steps=9")
    assert_same_run(tmp_path / "runs/smoke_1", trainer.run)
    assert [step for step, _ in curve(trainer.run)] == list(range(1, 10))
    for text in (capsys.readouterr().out, (trainer.run / "log.txt").read_text()):
        assert "state.pt" in text
        assert "going on from state.previous.pt, step 6" in text
    damage(trainer.run / "state.pt")
    damage(trainer.run / "state.previous.pt")
    before = {path: path.read_bytes() for path in trainer.run.iterdir()}
    assert re.search(r"state\.previous\.pt.*--saved_model", trainer.refused("--steps=12"))
    assert {path: path.read_bytes() for path in trainer.run.iterdir()} == before


def test_a_state_of_another_run_is_refused(trainer: Trainer) -> None:
    trainer("--steps=1")
    trainer("--steps=1", "--pln_channels=3")
    content = trainer.state()
    assert content.generator is not None
    other = load_state(trainer.run.with_name("smoke_1"))
    assert other is not None
    for wrong, named in (
        (replace(content, optimizer=other.optimizer), "other weights"),
        (replace(content, generator=content.generator[:-1]), "state of this run"),
        (replace(content, network="OML"), "holds OML"),
    ):
        wrong.save(trainer.run / NAME)
        assert named in trainer.refused("--steps=2")


HEADER = b"step,loss,accuracy_trajectory,accuracy_remember,seconds\n"


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (HEADER + b"1,2,0,0,1\n2,2,0,0,1\n3,2,0", 2),
        (HEADER + b"1,2,0,0,1\n\xff\xfe\n2,2,0,0,1\n", 2),
        (HEADER + b"1,2,0,0,1\n1,2,0,0,1\n2,2,0,0,1\n7,2,0,0,1\n", 2),
        (EDITORS["both"](HEADER + b"1,2,0,0,1\n2,2,0,0,1\n"), 2),
        (b"step,lo", 0),
        (None, 0),
    ],
)
def test_metrics_that_are_torn_lost_or_edited(left: bytes | None, kept: int, trainer: Trainer) -> None:
    trainer("--steps=2")
    metrics, config = trainer.run / "metrics.csv", trainer.run / "config.json"
    metrics.unlink() if left is None else metrics.write_bytes(left)
    config.write_bytes(EDITORS["lines of Windows"](config.read_bytes()))
    trainer.resume("--steps=4")
    assert [int(row["step"]) for row in rows(trainer.run)] == [1, 2, 3, 4][2 - kept :]
    assert ("lacks 2 of the 2 steps" in (trainer.run / "log.txt").read_text()) == (kept == 0)


def test_what_may_change(trainer: Trainer) -> None:
    trainer("--steps=4")
    for flags, named in (
        (["--meta_lr=0.01"], "--meta_lr is 0.01 and was 0.001"),
        (["--first_order", "--seed=4"], "--first_order is True and was False; --seed is 4 and was 9"),
        (["--checkpoint"], "--checkpoint"),
        (["--config", str(ROOT / "configs/anml.toml")], "--remember is 64 and was 8"),
    ):
        assert named in trainer.refused(*flags)
    flags = ["--seed", "9", "--log_every=1", "--save_every=2", "--device=cpu", "--threads=1"]
    trainer.resume("--steps=5", *flags)
    config = json.loads((trainer.run / "config.json").read_text())
    assert (config["arguments"]["steps"], config["arguments"]["save_every"]) == (5, 2)
    assert config["arguments"]["config"] == str(ROOT / "configs/smoke.toml")
    assert [entry["step"] for entry in config["resumed"]] == [4]
    trainer.resume()  # nothing to do, which is no error
    assert re.search("--steps 4: .* has done 5", trainer.refused("--steps=4"))


def test_a_head_for_more_classes(trainer: Trainer) -> None:
    """A training on more classes than outputs widens the head, draws it by the seed, and goes on with it."""
    for seed in (1, 2):
        flags = ["--num_classes=8", "--train_classes=20", f"--seed={seed}", f"--model_name={seed}.net"]
        trainer(*flags, "--steps=1", f"--name=wide_{seed}")
    trainer.run = Path("runs/wide_1_0")
    assert "the head has 20 new outputs" in (trainer.run / "log.txt").read_text()
    heads = [load_checkpoint(Path(f"{seed}.net")).state_dict["head.weight"] for seed in (1, 2)]
    assert len(heads[0]) == 20
    assert not torch.equal(*heads)
    trainer.resume("--steps=2")
    saved = load_checkpoint(Path("1.net"))
    assert (saved.step, saved.widths["num_classes"]) == (2, 20)


def test_folders_that_cannot_be_resumed(trainer: Trainer) -> None:
    trainer("--steps=1", "--model_name=m.net")
    config = trainer.run / "config.json"
    good = config.read_text()
    for content, named in (
        (good.replace('"data_hash": "', '"data_hash": "0'), "the data is not that"),
        (good[:-9], "damaged"),
        ("[]", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"arguments": {"stepz": 1}}', "stepz"),
        ('{"arguments": {"steps": "one"}}', "steps"),
        ('{"arguments": {"rln": [1, {}]}}', "rln"),
        (None, "not a run folder"),
    ):
        config.unlink() if content is None else config.write_text(content)
        assert named in trainer.refused()
    assert trainer.state().step == 1
    # A run of commit d362890 hashed names and sizes of files: that hash is not one of pixels.
    recorded = json.loads(good)["data_hash"]
    config.write_text(good.replace(f'"data_hash": "{recorded}"', '"manifest": "0"'))
    for steps in ("--steps=2", "--steps=3"):
        trainer.resume(steps)
        assert json.loads(config.read_text())["data_hash"] == recorded
    assert (trainer.run / "log.txt").read_text().count("records no data hash") == 1


def test_a_run_that_was_moved(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer("--steps=2", "--runs_dir=old/runs", f"--model_name={tmp_path}/old/m.net")
    Path("old").rename("new")
    trainer.run = Path("new/runs/best_7")
    Path("new/runs/smoke_0").rename(trainer.run)
    assert f"its --model_name is {tmp_path}/old/m.net" in trainer.refused("--steps=3")
    assert not Path("old").exists()
    Path("old").touch()
    assert f"cannot write --model_name {tmp_path}/old/m.net" in trainer.refused("--steps=3")
    trainer.resume("--steps=3", "--model_name=new/m.net", "--runs_dir=new/runs", "--name=best")
    trainer.resume("--steps=4")
    assert load_checkpoint(Path("new/m.net")).step == 4
    assert json.loads((trainer.run / "config.json").read_text())["name"] == "best_7"
    # What it named from where it was started stays where it is, and may be named from another folder.
    Path("c.toml").write_text('model-name = "../new/m.net"')
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    trainer.run = Path("../new/runs/best_7")
    trainer.resume("--steps=5")
    trainer.resume("--steps=6", "--config=../c.toml")
    assert load_checkpoint(tmp_path / "new/m.net").step == 6
    arguments = json.loads((trainer.run / "config.json").read_text())["arguments"]
    assert arguments["model_name"] == str(tmp_path / "new/m.net")
    assert not list(Path().iterdir())


def test_a_run_that_another_process_is_at_work_on(trainer: Trainer) -> None:
    trainer("--steps=2")
    for name in ("config.json", "metrics.csv", "model.net", "model_30.net", "state.pt"):
        (trainer.run / f".{name}.abc").write_text("half of it")
    before = {path: path.read_bytes() for path in trainer.run.iterdir()}
    with FileLock(trainer.run / ".lock"):
        assert "smoke_0 is in use" in trainer.refused("--steps=3")
    assert {path: path.read_bytes() for path in trainer.run.iterdir()} == before
    trainer.resume("--steps=3")
    assert not list(trainer.run.glob(".*.*")), "drafts of a killed run are left"
    for name in ("state.pt", "state.previous.pt", "model.net", "metrics.csv"):  # ended before its first state
        (trainer.run / name).unlink()
    trainer.resume()
    trainer("--steps=3")
    assert_same_run(trainer.run, Path("runs/smoke_1"))


def test_steps_that_are_done_again_have_no_speed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A killed training leaves rows of steps after its last saved state."""
    caplog.set_level(logging.INFO, "anml")
    jobs._tell(tmp_path, [1, 2], 10, begun=5, seconds=1.0)
    assert caplog.messages == ["seed 1: 0, seed 2: 0 of 10 steps, -5 step/s, ? left"]


FOLDER = Path("runs/all_0")
RUNS, MODELS = ([FOLDER / f"seed_{seed}{end}" for seed in (3, 11)] for end in ("_0", ".net"))


def test_seeds_are_the_runs_of_each_seed(
    trainer: Trainer, run: Run, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after their parent was killed, one failed, and a signal that the parent passes on."""
    flags = [*trainer.flags, "--steps=60", "--threads=1", "--seeds", "3", "11", "--jobs=2", "--name=all"]
    parent = forks.start(tmp_path, "mrcl_classification", *flags, "--save_every=5")
    forks.kill_when(lambda: all((run / "state.pt").exists() for run in RUNS), parent)
    for model, folder in zip(MODELS, RUNS, strict=True):
        with FileLock(folder / ".lock", timeout=60):  # the training ends by itself
            assert load_checkpoint(model).step < 60, "too fast for this test"

    trainer.run = FOLDER
    assert "--seeds is [3] and was [3, 11]" in trainer.refused("--seeds=3")

    # A training that fails is named, and the other goes on.
    state = (RUNS[0] / "state.pt").read_bytes()
    for name in ("state.pt", "state.previous.pt"):
        (RUNS[0] / name).write_bytes(b"")
    failure = trainer.refused()
    assert re.search(r"error: 1 of 2 trainings failed: seed 3: cannot read .*seed_3_0/state.pt", failure)
    assert load_checkpoint(MODELS[1]).step == 60
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
    assert "seed 3: 60, seed 11: 60 of 60 steps" in (FOLDER / "log.txt").read_text()
    for seed, folder in zip((3, 11), RUNS, strict=True):
        trainer("--steps=60", f"--seed={seed}", f"--name=alone_{seed}")
        assert_same_run(Path(f"runs/alone_{seed}_0"), folder)

    test = ["--dataset=glyphs", *trainer.flags[-1:], "--schedule", "3", "--runs=2", "--lr=0.01"]
    run(evaluate_classification, f"--model={FOLDER}", "--name=test", *test)
    found = read_results(Path("runs/test_0")).rows
    assert [row["model"] for row in found] == [str(model) for model in MODELS for _ in range(2)]
    assert [line["models"] for line in summarise(found)] == [2]
