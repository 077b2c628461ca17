"""Flags: every released one, both spellings, ranges, config files, and one-line errors."""

import json
from pathlib import Path

import pytest

from flags.evaluation import Evaluation
from flags.training import Plan, Training
from model.treatments import Weights
from tests.conftest import EDITORS
from tools import plot_results
from utils import flag
from utils.command_line import Parser, parse, recorded
from utils.errors import UserError
from utils.flag import Flags

CONFIGS = Path(__file__).parents[2] / "configs"
AS_RELEASED = """--rln 7 --meta_lr 0.001 --update_lr 0.1 --name mrcl_omniglot --steps 20000 --seed 9
    --model_name Neuromodulation_Model.net"""
RELEASED_TRAIN = """--steps 5 --model_name m.net --treatment Neuromodulation --checkpoint
    --saved_model s.net --seed 9 --tasks 2 --meta_lr 0.001 --update_lr 0.1
    --update_step 20 --name n --dataset omniglot --commit --no-reset --rln 7 --model none"""
RELEASED_EVALUATE = """--epoch 1 --seed 222 --schedule 10 50 --memory 0 --model m.net --scratch
    --dataset omniglot --dataset-path d --name n --commit --no-freeze --reset --test --iid
    --rln 0 --runs 10 --neuromodulation"""


def train(text: str) -> Training:
    return parse(Training, text.split())


def evaluate(text: str) -> Evaluation:
    return parse(Evaluation, text.split())


@pytest.mark.parametrize("command", [AS_RELEASED, f"--config {CONFIGS / 'anml.toml'}"])
def test_the_released_command_and_the_preset_of_the_paper_give_the_defaults(command: str) -> None:
    args, left_open = train(command), {"config": None, "rln": None, "model_name": None}
    assert Plan.of(args, 963) == Plan.of(train(""), 963)
    assert recorded(args) | left_open == recorded(train(""))


def test_every_released_flag_is_accepted() -> None:
    training = train(RELEASED_TRAIN)
    assert (training.treatment, training.loop["reset"], training.loop["rln"]) == ("ANML", False, 7)
    assert [notice.split()[0] for notice in training.notices] == ["--model", "--commit"]
    arguments = evaluate(RELEASED_EVALUATE)
    assert (arguments.schedule, arguments.model) == ([10, 50], [Path("m.net")])
    assert arguments.iid
    assert arguments.test
    noticed = [notice.split()[0] for notice in arguments.notices]
    assert noticed == ["--memory", "--neuromodulation", "--commit"]


def test_both_spellings_of_every_flag() -> None:
    typed = "--no-reset --first-order --no_first-order --meta-lr 0.5 --dataset-path=a_b-c --net-nm-channels=3"
    for spelled in (
        typed,
        typed.replace("dataset-path", "dataset_path"),
        typed.replace("-", "_").replace("__", "--"),
    ):
        found = train(spelled.replace("=a_b_c", "=a_b-c"))
        assert (found.loop["reset"], found.loop["first_order"], found.meta_lr) == (False, False, 0.5)
        assert (found.dataset_path, found.constructor["nm_channels"]) == (Path("a_b-c"), 3)
    assert all("-" not in option[2:] for kind in (Training, Evaluation) for option in Parser(kind).flags)


def test_defaults_follow_the_treatment() -> None:
    oml = train("--treatment oml")
    made: Weights = "meta-trained"
    assert (oml.treatment, Plan.of(oml, 9)) == ("OML", Plan(6, 9, Path("OML_Model.net"), made))
    assert Plan.of(train("--rln 5 --model_name m.net"), 9) == Plan(5, 9, Path("m.net"), made)
    iid = train("--learner=iid")  # as many images a step as meta-training sees
    assert (iid.steps, iid.loop) == (20000, {"batch_size": 20 + 64})
    assert (iid.treatment, iid.meta_lr, "hidden" in iid.constructor) == ("OML", 0.0001, True)
    assert Plan.of(iid, 963) == Plan(6, 963, Path("Pretrain_Model.net"), "pretrained")
    # With a model file, the network is unknown until the file is read.
    known = evaluate("--model m")
    assert (known.rln, recorded(known)["treatment"], recorded(known)["nm_channels"]) == (None, None, None)
    scratch = evaluate("--scratch --pln-channels 8")
    assert (scratch.rln, scratch.treatment, scratch.constructor["pln_channels"]) == (None, "ANML", 8)
    assert evaluate("--model m --no-freeze").rln == 0


def test_a_flag_of_several_values_that_is_typed_again_adds_to_them() -> None:
    assert evaluate("--scratch --schedule 10 50 --schedule 2").schedule == [10, 50, 2]


WRONG: dict[type[Flags], dict[str, str]] = {
    Training: {
        "--steps 0": "--steps",
        "--steps 1.5": "--steps",
        f"--steps {'9' * 5000}": "--steps",
        "--step 5": "--step",  # no abbreviations
        "--meta_lr nan": "--meta_lr",
        "--update_lr -0.1": "--update_lr",
        "--seed -1": "--seed",
        "--seed 4294967296": "--seed",
        "--treatment MAML": "--treatment",
        "--name a/b": "--name",
        "--name ..": "--name",
        "--name \0": "--name",
        "--name \udcff": "--name",
        "--seed=": "--seed",
        "--unknown=1": "--unknown",
        "--checkpoint": "--saved_model",
        "--saved_model m.net": "--checkpoint",
        "--config no_such_file.toml": "no_such_file.toml",
    },
    Evaluation: {
        "": "--model",
        "--model m --no-freeze --rln 7": "--no-freeze",
        "--model m --schedule ten": "--schedule",
        "--model m --lrs 0.1 0": "--lrs",
        "--model m --schedule 5 --schedule 5": "--schedule",
    },
}


@pytest.mark.parametrize(("kind", "typed"), [(kind, typed) for kind in WRONG for typed in WRONG[kind]])
def test_wrong_flags(kind: type[Flags], typed: str) -> None:
    with pytest.raises(UserError, match=WRONG[kind][typed]):
        parse(kind, typed.split())


def test_only_typed_flags_override_a_config(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('steps = 7\nmeta-lr = 1\nreset = false\ntreatment = "oml"\nseed = 3\n')
    arguments = train(f"--config {file} --seed 9 --treatment ANML")
    assert (arguments.steps, arguments.meta_lr, arguments.loop["reset"]) == (7, 1.0, False)
    # 9 and ANML are the defaults: typed, they count all the same.
    assert (arguments.seed, arguments.treatment, Plan.of(arguments, 9).rln) == (9, "ANML", 7)
    assert train(f"--config {file} --reset").loop["reset"]
    file.write_text("schedule = [2, 3]\nscratch = true\nlrs = [1, 0.5]\n")
    evaluation = evaluate(f"--config {file}")
    assert (evaluation.schedule, evaluation.lrs) == ([2, 3], [1.0, 0.5])
    assert evaluate(f"--config {file} --schedule 4").schedule == [4]
    # What is typed makes flags of the config idle; within a config that is a contradiction.
    assert evaluate(f"--config {file} --lr 2").lr == 2
    file.write_text("scratch = true\nlr = 2\niid = true\nepoch = 3\n")
    heads = evaluate(f"--config {file} --learner ncm")
    assert (heads.lr, heads.iid, heads.epoch, heads.scratch) == (None, False, 1, True)
    file.write_text("seed = 3\nprocesses = 2\n")
    seeds = train(f"--config {file} --seeds 4 5")
    assert (seeds.seeds, seeds.seed, seeds.processes) == ([4, 5], 9, 1)
    Path(tmp_path, "config.json").write_text(json.dumps({"arguments": recorded(seeds)}))
    assert train(f"--config {file} --seeds 4 5 --resume {tmp_path}").seeds == [4, 5]
    file.write_text("lr = 2\nscratch = true\nlrs = [1, 0.5]\n")
    with pytest.raises(UserError, match=r"--lrs 1.0 0.5 means nothing with --lr: drop one of them"):
        evaluate(f"--config {file}")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stepz = 5", "stepz"),
        ("config = 'x'", "config"),
        ("model = [1]", "model"),
        ("steps = 0", "steps"),
        ("steps = true", "steps"),
        ("first_order = 'true'", "'true' is not true or false"),
        ("name = 2026-01-01", "name"),
        ("meta_lr = inf", "meta_lr"),
        ("[method]\nsteps = 5", "method"),
        ("steps = ", "not a TOML file"),
        (f"steps = {'9' * 5000}", "not a TOML file"),
        ("steps = 5\nsteps = 6", "not a TOML file"),
        (b"\xff\xfe\x00", "is not text"),
        (None, "Is a directory"),
    ],
)
def test_wrong_config_names_file_and_key(text: str | bytes | None, named: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{file}.*{named}"):
        train(f"--config {file}")


@pytest.mark.parametrize("edit", EDITORS)
def test_config_of_an_editor(edit: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(EDITORS[edit]('# a comment\nsteps = 7\nname = "zürich"\n'.encode()))
    arguments = train(f"--config {file}")
    assert (arguments.steps, arguments.name) == (7, "zürich")


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "c.toml").write_text('model = ["~/a.net", "b.net"]\nruns_dir = "~/x"\n')
    arguments = evaluate(f"--config {tmp_path / 'c.toml'}")
    assert (arguments.model, arguments.runs_dir) == ([home / "a.net", Path("b.net")], home / "x")
    assert plot_results.labelled(["a=~/x", "~/x"]) == {"a": home / "x", "x": home / "x"}
    for typed in ("./~/x", "~no such user/x", "a/~"):
        assert parse(Training, [f"--runs_dir={typed}"]).runs_dir == Path(typed)


def test_the_data_of_the_project_is_the_default_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is typed is relative to the current folder, unless it is there in the project alone."""
    here, project = tmp_path / "here", tmp_path / "project"
    for folder in (here, project / "data"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(flag, "PROJECT", project)
    monkeypatch.chdir(here)

    def places(typed: str) -> list[str]:
        args = train(typed)
        return [str(path).replace(str(project), "PROJECT") for path in (args.dataset_path, args.cache_dir)]

    assert places("") == ["PROJECT/data", "PROJECT/data/cache"]
    assert places("--cache_dir=data/cache --dataset_path=x") == ["x", "data/cache"]
    assert places("--cache_dir=c --dataset_path=data") == ["PROJECT/data", "c"]
    (here / "data").mkdir()
    assert places("") == ["data", "data/cache"]


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    tokens = ["--config", str(preset)]
    if f"evaluate_classification.py --config configs/{preset.name}" in preset.read_text():
        parse(Evaluation, [*tokens, "--model=M.net"])
    else:
        parse(Training, tokens)


@pytest.mark.parametrize("kind", [Training, Evaluation])
def test_help_says_the_default_of_every_flag(kind: type[Flags]) -> None:
    parser = Parser(kind)
    parser.format_help()
    assert all("(default: " in (action.help or "") for action in parser.flags.values())
