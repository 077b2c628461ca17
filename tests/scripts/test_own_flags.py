"""Arguments of networks and data sets of one's own as flags, through both scripts."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate_classification
import mrcl_classification
from datasets import DATASETS
from datasets.images import ImageSet
from model.learner import LEARNERS, LearnerKind, NearestClassMean
from model.modelfactory import NETWORKS, Network, build, load_network
from tests.conftest import Call, Run
from utils.errors import UserError
from utils.flag import Range


class Taken(Network):
    """Arguments that are called as flags are."""

    def __init__(
        self,
        channels: int = 3,
        features: int = 4,
        power: float = 0.5,
        lr: float = 0.1,
        test: bool = True,
        runs: int = 2,
        options: int = 1,
        given: str = "x",
        num_classes: int = 20,
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, channels, 3, stride=3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(81 * channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images))
        return logits


class Mine(Taken):
    """Every kind of argument: one has no annotation, one is by keyword alone, two must be given."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        kind: str,
        shift: Annotated[int, "what is added", Range(-5, 5)] = 0,
        depth: Annotated[int | None, "layers"] = None,
        rate=0.5,
        *,
        width: int,
        skip: bool = False,
    ) -> None:
        super().__init__(channels=width, num_classes=20)


class Tuple(Taken):
    """An argument that no flag can give."""

    def __init__(self, sizes: tuple[int, ...] = (3, 4), num_classes: int = 20) -> None:
        super().__init__(num_classes=num_classes)


def noise(
    split: str,
    root: Path,
    cache_dir: Path,
    *,
    data_seed: Annotated[int, "seed of the noise"] = 7,
    lr: float = 2.0,
    reset: str = "never",
) -> ImageSet:
    """Noise, whose options are called as flags are."""
    rng = np.random.default_rng(data_seed + 100 * (split == "evaluation"))
    return ImageSet.of(
        f"noise {data_seed} {lr} {reset} {split}",
        {f"class {k}": rng.integers(0, 256, (20, 28, 28), np.uint8) for k in range(12)},
    )


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for network in (Taken, Mine, Tuple):
        monkeypatch.setitem(NETWORKS, network.__name__, network)
    monkeypatch.setitem(DATASETS, "Noise", noise)
    kind = LearnerKind(NearestClassMean, "cosine")
    monkeypatch.setitem(LEARNERS, "Cosine", kind)


SHORT = ["--threads=1", "--steps=1", "--update_step=2", "--remember=2", "--save_every=1", "--model_name=m"]


@pytest.fixture
def trained(run: Run) -> Run:
    """Trains on noise, with flags."""
    return partial(run, mrcl_classification, *SHORT, "--dataset=noise", "--name=t")


def test_names_that_flags_have(trained: Run, run: Run, call: Call) -> None:
    """Trained, resumed, tested: as a network of the command line, of a model file, and as another model."""
    given = ["--net_channels=2", "--net-features=5", "--net_power=0.25", "--data_reset=once", "--data-lr=3"]
    given += ["--net_options=3", "--net_given=y"]
    trained("--treatment=taken", *given, "--meta_lr=0.01", "--no-net_test", "--seed=3", "--data_seed=8")
    net = load_network("m")
    expected = {"channels": 2, "features": 5, "power": 0.25, "lr": 0.1, "test": False, "runs": 2}
    assert net.widths == {**expected, "options": 3, "given": "y", "num_classes": 20}
    config = json.loads(Path("runs/t_0/config.json").read_text())
    assert config["data"] == "noise 8 3.0 once background"
    assert (config["arguments"]["rln"], config["arguments"]["train_classes"]) == (None, None)
    plan = {"rln": 0, "train_classes": 12, "model_name": str(Path("m").resolve())}
    assert config["plan"] == plan | {"weights": "meta-trained"}
    same = ["--net_channels=2", "--dataset=Noise", "--rln=0", "--train_classes=12"]
    run(mrcl_classification, "--resume=runs/t_0", "--steps=2", *same)
    refused = call(mrcl_classification, "--resume=runs/t_0", "--steps=3", "--net_channels=3", "--rln=1")
    assert "--net_channels is 3 and was 2; --rln is 1 and was 0" in refused.stderr
    short = ["--threads=1", "--schedule=2", "--runs=1", "--dataset=noise", "--name=e"]
    for flags in (
        ["--model=m", "--lrs=0.01", "--test"],
        ["--model=m", "--learner=Cosine", "--features=gated", "--power=1"],
        ["--scratch", "--treatment=Taken", "--net_channels=2", "--net_lr=0.3", "--lr=0.01"],
        ["--scratch", "--nm_channels=2", "--pln_channels=2", "--lr=0.01"],
    ):
        run(evaluate_classification, *short, *flags)


def test_every_kind_of_argument(trained: Run) -> None:
    given = ["--kind=relu", "--shift=-3", "--width=2", "--rate=0.25", "--skip"]
    trained("--treatment=Mine", *given)
    recorded = json.loads(Path("runs/t_0/config.json").read_text())["arguments"]
    assert recorded | {"kind": "relu", "depth": None, "rate": 0.25, "skip": True} == recorded
    expected = {"kind": "relu", "shift": -3, "rate": 0.25, "width": 2, "skip": True}
    assert load_network("m").widths == expected
    Path("c.toml").write_text('treatment = "mine"\nkind = "gelu"\nwidth = 2\nskip = true\nshift = -5\n')
    trained("--config=c.toml", "--no-skip", "--depth=-2")
    expected = {"kind": "gelu", "shift": -5, "depth": -2, "rate": 0.5, "width": 2, "skip": False}
    assert load_network("m").widths == expected
    # A typed network leaves a config's arguments of another.
    Path("c.toml").write_text("treatment = 'OML'\nhidden = 8\nnum_classes = 30\ndata_seed = 1")
    trained("--config=c.toml", "--treatment=Taken")
    assert (load_network("m").widths["num_classes"], load_network("m").network) == (30, "Taken")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--treatment OML --nm_channels 8", "--nm_channels means nothing with --treatment OML"),
        ("--treatment OML --nm-channels 8", "--treatment ANML"),
        ("--hidden 8", "--hidden means nothing with --treatment ANML: it belongs to --treatment OML"),
        ("--glyph_seed 8", "--glyph_seed means nothing with --dataset Noise: it belongs to --dataset glyphs"),
        ("--config c.toml", "c.toml: --hidden means nothing with --treatment ANML"),
        ("--treatment Taken --channels 8", "--channels means nothing with --dataset Noise"),
        ("--nm_channels 0", "--nm_channels/--net_nm_channels: '0': choose 1 or greater"),
        ("--data_seed 0.5", "'0.5' is not a whole number"),
        ("--data_lr nan", "'nan' is not a finite number"),
        ("--treatment Mine --kind relu", "--treatment Mine needs --width"),
        ("--treatment Mine --kind relu --width 2 --shift -6", "choose -5 or greater, at most 5"),
        ("--treatment Mine --kind=\udcff --width 2", "is not a text"),
        ("--treatment Tuple", "Tuple: its argument `sizes: tuple[int, ...] = (3, 4)` can be no flag"),
    ],
)
def test_refused_in_one_line(flags: str, said: str, call: Call) -> None:
    Path("c.toml").write_text("hidden = 8")
    done = call(mrcl_classification, *SHORT, "--dataset=noise", *flags.split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert not Path("runs").exists()


def test_help_is_that_of_the_chosen_network(call: Call) -> None:
    shown = {
        name: call(mrcl_classification, "--treatment", name, "--help").stdout for name in ("OML", "Mine")
    }
    assert "--hidden" in shown["OML"]
    assert "--nm_channels" not in shown["OML"]
    assert "what is added (default: 0)" in shown["Mine"]
    assert "--width N, --net_width N (default: none, it must be given)" in " ".join(shown["Mine"].split())
    for name, text in shown.items():
        said = f"those of --treatment {name} among them; --treatment NAME --help shows another's"
        assert said in " ".join(text.split())


@pytest.mark.parametrize("name", ["features", "network", "gate", "frozen", "num_outputs", "widths", "train"])
def test_names_of_layers_that_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Layers(Network):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Sequential(nn.Flatten()))

    monkeypatch.setitem(NETWORKS, "Layers", Layers)
    with pytest.raises(UserError, match=rf"Layers: the name `self\.{name}` is taken, Network uses it"):
        build("Layers", {}, torch.Generator())
