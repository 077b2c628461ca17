"""What each script refuses: exit code 2, one line that names the fault, and nothing written."""

import shutil
from pathlib import Path
from types import ModuleType

import pytest

import evaluate_classification
import mrcl_classification
from model.treatments import TABLE
from tests.conftest import ROOT, Call
from tests.tools.test_ledger import write_accuracies
from tools import (
    analyze_representation,
    benchmark,
    check_network,
    compare_results,
    convert_released,
    ledger,
    plot_results,
)

GLYPHS = "--dataset glyphs --threads 1"
SMOKE = f"--config {ROOT}/configs/smoke.toml --model_name new.net --threads 1"
PROTOTYPES = f"{GLYPHS} --learner prototypes --train_classes 20 --ways 5 --nm_channels 2 --pln_channels 2"
IID = f"{GLYPHS} --learner iid --pln_channels 6 --train_classes 5 --num_classes 8"
EVALUATE = f"{GLYPHS} --model ANML.net --test_classes 10"
PRESET = f"{EVALUATE} --treatment-preset"
ANALYZE = f"{GLYPHS} --model ANML.net"

SIZES = {
    "--size=7": "--size: '7': choose 8 or greater, at most 512",
    "--size=513": "--size: '513': choose 8 or greater, at most 512",
    "--size=28.5": "--size: '28.5' is not a whole number",
    "--size=12 --treatment=OML": "--size 12 is too small: the network has no positions left",
    "--size=15 --treatment=Conv4": "--size 15 is too small: the network has no positions left",
}

# Script: flags -> what the line says.
REFUSED: dict[ModuleType, dict[str, str | tuple[str, ...]]] = {
    mrcl_classification: {
        f"{SMOKE} --rln 14": "--rln 14",
        f"{SMOKE} --train_classes 965 --num_classes 1000": "964 classes",
        f"{SMOKE} --update_step 21": "21",
        f"{SMOKE} --tasks 21": "--tasks 21",
        f"{SMOKE} --eval_every 5 --eval_classes 9 --train_classes 8": "--eval_classes 9",
        f"{SMOKE} --runs_dir file/runs": "file/runs",
        f"{SMOKE} --model_name file/model.net": "file/model.net",
        f"{SMOKE} --checkpoint --saved_model file": "file",
        f"{SMOKE} --checkpoint --saved_model nowhere.net": "nowhere.net",
        f"{GLYPHS} --checkpoint --saved_model ANML.net --nm_channels 3": "means nothing with --saved_model",
        f"{SMOKE} --dataset omniglot --dataset-path file": "file",
        f"{SMOKE} --dataset_path x": "--dataset_path x means nothing with --dataset glyphs",
        f"{SMOKE} --device gpu": "--device gpu: not on this machine; it has",
        f"{PROTOTYPES} --update_lr 0.1": "--update_lr means nothing with --learner prototypes",
        f"{PROTOTYPES} --learner sgd": "means nothing with --learner sgd",
        f"{PROTOTYPES} --ways 90": "--ways 90 classes",
        f"{PROTOTYPES} --shots 19": "21 of each class",
        f"{IID} --eval_classes 5": "--eval_classes 5 means nothing with --eval_every 0",
        f"{IID} --nm_channels 5": "--nm_channels means nothing with --treatment OML",
        **{f"{GLYPHS} {flags}": said for flags, said in SIZES.items()},
        f"{GLYPHS} --seeds 1 2 --seed 3": "--seed 3 means nothing with --seeds",
        f"{SMOKE} --seeds 1 2": "--model_name new.net means nothing with --seeds",
        f"{GLYPHS} --seeds 1 1": "--seeds names a seed twice",
        f"{GLYPHS} --jobs 2": "--jobs 2 means nothing with one --seed",
    },
    evaluate_classification: {
        f"{EVALUATE} --rln 14": "--rln 14",
        f"{EVALUATE} --test_classes 660": "659",
        f"{EVALUATE} --model nowhere.net": "nowhere.net",
        f"{EVALUATE} --track_every 2 --iid": "--track_every",
        f"{GLYPHS} --model m n --scratch": "--scratch",
        f"{PRESET} ANML --rln 6": "ANML means --rln 13, not --rln 6",
        f"{EVALUATE} --rln 13 --treatment-preset OML-Oracle": "OML-Oracle means --rln 6, not --rln 13",
        f"{PRESET} ANML-Oracle --no-iid": "--iid, not --no-iid",
        f"{PRESET} ANML-Unlimited --reset": "drop --reset",
        f"{PRESET} Scratch --no-scratch": "--scratch, not --no-scratch",
        f"{PRESET} MAML": ("MAML", *TABLE),
        **{
            f"{EVALUATE} --learner slda {flag}": flag.split()[0].removeprefix("--no-")
            for flag in ("--lrs 0.1", "--no-freeze", "--optimizer adam", "--shrinkage 1.5", "--power 0")
        },
        f"{EVALUATE} --learner ncm --shrinkage 0.5": "--shrinkage",
        f"{EVALUATE} --dataset_path x": "--dataset_path x means nothing with --dataset glyphs",
        f"{EVALUATE} --treatment ANML": "--treatment ANML means nothing with --model",
        f"{EVALUATE} --features gate": "--features",
        f"{EVALUATE} --lr 0.1 --lrs 0.1": "--lrs 0.1 means nothing with --lr",
        f"{EVALUATE} --lr 0.1 --test": "--test means nothing with --lr",
        f"{GLYPHS} --model sANML.net --learner ncm --features gate": "--features gate: sANML has no gate",
        f"{GLYPHS} --model OML.net --treatment-preset ANML": ("ANML", "OML.net holds meta-trained OML"),
        f"{GLYPHS} --model OML.net --treatment-preset Pretrain": ("pretrained OML", "meta-trained OML"),
        f"{GLYPHS} --model Pretrain.net --treatment-preset OML": ("meta-trained OML", "pretrained OML"),
        f"{GLYPHS} --model OML.net --rln 13": ("--rln 13", "OML"),
        f"{GLYPHS} --model ANML.net OML.net": ("one treatment", "OML.net holds ('meta-trained', 'OML'"),
        f"{GLYPHS} --model OML.net Pretrain.net": ("one treatment", "Pretrain.net"),
        f"{GLYPHS} --model ANML.net nowhere.net": "nowhere.net",
        f"{GLYPHS} --model {300 * 'x'}": "File name too long",
        f"{GLYPHS} --resume nowhere": "nowhere",
    },
    analyze_representation: {
        f"{ANALYZE} --model nowhere.net": "nowhere.net",
        f"{ANALYZE} --test_classes 660": "659 classes",
        GLYPHS: "--model",
    },
    plot_results: {
        "run_0 run_1": "no class count in common",
        "run_0 run_0/results.csv": "'run_0/results.csv'",
        "run_0 nowhere": "nowhere",
        "=run_0": "'=run_0'",
        "empty": "empty",
        "nonsense": "nonsense",
        "run_0 --out nonsense": "nonsense",
        "run_0 --against=steps": "how many steps",
        "run_0 --against=training": "cannot read run_0/metrics.csv",
        "nonsense --against=training": "accuracy_remember",
        "": "RESULTS",
    },
    compare_results: {
        "run_0 run_1": "no class count is in both: A run_0",
        "run_0 empty": "cannot read empty/results.csv",
    },
    ledger: {"results": "results"},
    convert_released: {
        "nowhere.net new.net": "nowhere.net",
        "file new.net": "file",
        "ANML.net": "TARGET",
        "file new.net --size 7": "--size",
        "file new.net --pixels red": "red",
    },
    check_network: {"Nothing": "'Nothing'", "": "NAME"},
    benchmark: {"--repeats 0": "--repeats"},
}


@pytest.fixture(scope="module")
def place(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, results, and a file where a folder is expected."""
    folder = tmp_path_factory.mktemp("place")
    for network in ("ANML", "sANML", "OML", "Pretrain"):
        shutil.copy(models / f"{network}.net", folder)
    for name, classes in (("run_0", 10), ("run_1", 20)):
        write_accuracies(folder / name, "results", {classes: (0.8, 0.9)})
    (folder / "empty").mkdir()
    (folder / "nonsense").write_text("no,results\n1,2\n")
    (folder / "file").write_text("not a folder")
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        pytest.param(script, flags, id=f"{script.__name__}-{flags.replace(str(ROOT), '')}")
        for script, table in REFUSED.items()
        for flags in table
    ],
)
def test_refused_in_one_line(
    script: ModuleType,
    flags: str,
    place: Path,
    cache: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    data = [f"--cache_dir={cache}"] if "--threads" in flags else []
    done, said = call(script, *flags.split(), *data), REFUSED[script][flags]
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert all(word in done.stderr for word in ("error: ", *([said] if isinstance(said, str) else said)))
    assert contents(place) == before
