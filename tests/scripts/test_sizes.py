"""Images of other sizes than 28: data, networks, and both scripts through to a tool."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate_classification
import mrcl_classification
from datasets import Source
from datasets.task_sampler import distort
from model.check import Use, check_network
from model.fast import FAST
from model.guard import difference
from model.modelfactory import NETWORKS, Network, build, load_network, restore, trained_parameters
from model.outer_loop import gather
from tests.conftest import Call, Run, assert_same_run
from tests.networks import OWN
from tools import analyze_representation
from tools import check_network as check_tool
from utils.errors import UserError
from utils.files import Checkpoint, load_checkpoint

WIDTHS = {
    "ANML": {"nm_channels": 2, "pln_channels": 3},
    "sANML": {"pln_channels": 3},
    "OML": {"pln_channels": 3},
    "Conv4": {"channels": 3},
}
# By size and network, positions a side that the convolutions leave (of ANML both networks).
POSITIONS = {
    8: {"ANML": 6},
    16: {"ANML": 5, "Conv4": 1},
    28: {"ANML": 3, "OML": 3, "Conv4": 1},
    32: {"ANML": 2, "OML": 4, "Conv4": 2},
    64: {"ANML": 2, "OML": 2, "Conv4": 4},
    84: {"ANML": 3, "sANML": 3, "OML": 3, "Conv4": 5},
}


def new(name: str, size: int) -> Network:
    return build(name, {**WIDTHS[name], "num_classes": 6}, torch.Generator().manual_seed(1), size)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of in POSITIONS.items() for name in of])
def test_a_network_of_a_size(size: int, name: str) -> None:
    net, left = new(name, size), POSITIONS[size][name]
    head = net.get_submodule("body.linear") if name == "OML" else net.head
    assert isinstance(head, nn.Linear)
    assert head.in_features == 3 * left**2
    if name == "ANML":
        gate = net.get_submodule("nm.gate")
        assert isinstance(gate, nn.Linear)
        assert (gate.in_features, gate.out_features) == (2 * left**2, 3 * left**2)
        names = [name for name, _ in net.named_parameters()]
        assert trained_parameters(net, 0) == names
        assert trained_parameters(net, 6) == [name for name in names if not name.startswith("nm.block")]
        assert trained_parameters(net, 7) == [name for name in names if not name.startswith("nm.")]
    if name in ("ANML", "sANML"):
        assert trained_parameters(net, net.default_meta_test_rln) == ["head.weight", "head.bias"]
        assert net.default_meta_test_rln == {"ANML": 13, "sANML": 6}[name]
    assert net(torch.zeros(2, 1, size, size)).shape == (2, 6)
    with pytest.raises(ValueError, match=rf"reads \[B, 3, {size}, {size}\]"):
        net(torch.zeros(2, 1, size + 1, size + 1))
    check_network(name, WIDTHS[name], every_cut=True, size=size)
    if name != "Conv4":
        assert difference(net.train(), torch.device("cpu"), Use(update_step=3), FAST) is None


def test_conv4_is_that_of_the_field() -> None:
    """Prototypical networks: 4 blocks of 64 channels, without the biases that norms take out."""
    net = build("Conv4", {"num_classes": 5}, torch.Generator().manual_seed(0), 84).double()
    body = [p.numel() for name, p in net.named_parameters() if name.startswith("body")]
    assert sum(body) == 9 * 3 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64
    x = images = torch.randn(2, 3, 84, 84, dtype=torch.float64)
    for block in range(1, 5):
        weight = net.get_parameter(f"body.block{block}.conv.weight")
        x = nn.functional.conv2d(x, weight, padding=1)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = nn.functional.max_pool2d(x.relu(), 2)
    torch.testing.assert_close(net.train().features(images), x.flatten(1))


def test_batch_norm_is_not_frozen_in_training() -> None:
    """A batch in training has statistics of its own, which the frozen part of a larger one would not have."""
    net, images = new("Conv4", 16), torch.randn(4, 3, 16, 16)
    whole = net.train().frozen(images, ["head.weight"])
    torch.testing.assert_close(net(whole[:2]), net(images[:2]), rtol=0, atol=0)
    torch.testing.assert_close(net.eval()(net.frozen(images, ["head.weight"])), net(images))


def test_distortions_are_parts_of_the_side() -> None:
    """A shift moves an image of 56 twice as many pixels as one of 28."""
    small = torch.zeros(64, 1, 28, 28)
    small[:, :, 12:16, 12:16] = 1
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    moved, doubled = (distort(x, torch.Generator().manual_seed(0), 1.0) for x in (small, large))
    grid = torch.arange(28.0)
    for axis in (grid[:, None], grid):
        centre = (moved * axis).sum((2, 3)) / moved.sum((2, 3))
        shrunk = nn.functional.avg_pool2d(doubled, 2)
        found = (shrunk * axis).sum((2, 3)) / shrunk.sum((2, 3))
        torch.testing.assert_close(found, centre, atol=0.05, rtol=0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Classes of six grey pictures, six for meta-training and four for meta-test, one of which is small."""
    root, rng = tmp_path / "pictures", np.random.default_rng(0)
    for number in range(10):
        folder = root / ("background" if number < 6 else "evaluation") / f"class {number}"
        folder.mkdir(parents=True)
        for k in range(6):
            side = 20 if number + k == 0 else 40
            Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(folder / f"{k}.png")
    return root


def test_data_of_a_size(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = {}
    for size in (28, 32, 28, 16):
        caplog.clear()
        images = Source("folder", pictures, tmp_path / "cache", size=size).load("background")
        assert images.images.shape == (36, 1, size, size)
        picture = Image.open(pictures / "background/class 0/1.png")
        chosen = Image.Resampling.LANCZOS if size == 28 else Image.Resampling.BILINEAR
        assert np.array_equal(images.images[1, 0], np.asarray(picture.resize((size, size), chosen)))
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        small = f"pictures smaller than {size} x {size} are enlarged, among them "
        assert said == ([small + f"{pictures}/background/class 0/0.png, 20 x 20"] if size > 20 else [])
        found[size] = images.data_hash
    assert len({*found.values()}) == 3
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.removesuffix(".npz").split("-", 2)[2:] for name in names] == [["16"], ["32"], []]


def test_images_stay_bytes_until_a_batch_is_made(pictures: Path, tmp_path: Path) -> None:
    images = Source("folder", pictures, tmp_path / "cache", size=32).load("background")
    pool = images.pool("cpu")
    assert pool.rows.data_ptr() == images.images.data_ptr()
    index = torch.tensor([[1, 2], [5, 0]])
    assert images.normalisation is not None
    (mean,), (std,) = images.normalisation.mean, images.normalisation.std
    expected = (images.images[[8, 30]].numpy().astype(np.float32) - np.float32(mean)) / np.float32(std)
    assert np.array_equal(gather(pool, index)[0], expected)
    assert np.array_equal(pool[1][2], expected[0])


@pytest.mark.parametrize(
    ("network", "flags"),
    [
        ("ANML", "--update_step=3 --remember=4 --nm_channels=2 --pln_channels=3"),
        ("Conv4", "--learner=prototypes --no-cosine --ways=4 --channels=3 --symmetries=8 --augment=1"),
        ("Conv4", "--learner=iid --batch_size=25 --channels=3"),  # batches across passes of 36 images
    ],
)
def test_through_the_scripts(network: str, flags: str, pictures: Path, run: Run, call: Call) -> None:
    """A training at 32 that is interrupted; its model says its size to everything that follows."""
    data = ["--dataset=folder", f"--dataset_path={pictures}", "--threads=1", "--num_classes=8"]
    train = [*data, f"--treatment={network}", "--size=32", *flags.split(), "--model_name=m.net"]
    train += ["--eval_every=2", "--eval_classes=2"]
    run(mrcl_classification, *train, "--name=part", "--steps=2")
    run(mrcl_classification, "--resume=runs/part_0", "--steps=4")
    run(mrcl_classification, *train, "--name=whole", "--steps=4")
    assert_same_run(Path("runs/part_0"), Path("runs/whole_0"))
    assert load_checkpoint(Path("m.net")).arguments["size"] == 32
    assert "size" not in load_checkpoint(Path("m.net")).widths
    assert load_network("m.net").image_size == 32
    test = [*data[:3], "--model=m.net", "--train_images=3", "--test_images=2"]
    run(evaluate_classification, *test, "--lr=0.01", "--runs=1", "--name=test")
    run(evaluate_classification, *test, "--scratch", "--rln=0", "--lr=0.01", "--runs=1", "--size=32")
    run(analyze_representation, *test)
    saved = ["--checkpoint", "--saved_model=m.net", "--name=on", "--steps=1"]
    shape = "--size", "--channels", "--nm", "--num", "--pln"
    without = [flag for flag in train if not flag.startswith(shape)]
    run(mrcl_classification, *without, *saved, "--model_name=on.net")
    assert load_network("on.net").image_size == 32
    for script, other in (
        (evaluate_classification, [*test, "--lr=0.01", "--size=28"]),
        (analyze_representation, [*test, "--size=84"]),
        (mrcl_classification, [*without, *saved, "--size=28"]),
        (mrcl_classification, ["--resume=runs/part_0", "--steps=5", "--size=28"]),
    ):
        done = call(script, *other)
        assert (done.returncode, done.stderr.splitlines()[:-1]) == (2, []), done.stderr
        assert "--size" in done.stderr


def test_what_has_no_size_is_of_28() -> None:
    net = new("sANML", 28)
    saved = Checkpoint("sANML", net.widths, dict(net.state_dict()), {}, 0)
    assert restore(saved, "m.net").image_size == 28
    for wrong in (7, 513, "28", 84, True):
        with pytest.raises(UserError, match=r"^m\.net does not hold a network sANML"):
            restore(Checkpoint("sANML", net.widths, saved.state_dict, {"size": wrong}, 0), "m.net")


class Sized(Network):
    """A network of one's own that asks for the size."""

    def __init__(self, size: int, width: int = 2, num_classes: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, width), nn.Tanh())
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.trunk(images.expand(-1, 3, -1, -1)))
        return logits


def test_a_network_of_ones_own(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Sized", Sized)
    monkeypatch.setitem(NETWORKS, "GroupNorm", OWN["GroupNorm"])  # for 28 alone
    assert call(check_tool, "Sized", "--size=9").returncode == 0
    assert build("Sized", {"width": 3}, torch.Generator(), 9).widths == {"width": 3, "num_classes": 6}
    done = call(check_tool, "GroupNorm", "--size=9")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "network GroupNorm fails on 2 images of 9 x 9" in done.stderr
