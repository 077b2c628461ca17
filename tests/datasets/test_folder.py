"""A folder of pictures as a data set, through the scripts where it matters, and a loader of one's own."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_classification
import mrcl_classification
from datasets import DATASETS, Source, images
from datasets.images import ImageSet, Normalisation, shrink
from evaluation.results import read_results, summarise
from model.fast import choose_backend
from model.modelfactory import load_network
from tests.conftest import ROOT, TINY, Evaluate, Run, shown, warnings_of
from tools import analyze_representation
from utils.errors import UserError

Colour = tuple[int, ...]


def picture(number: int, mode: str = "L", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Noise of which no two numbers are alike."""
    width, height = size
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8), mode)


def fill(root: Path, classes: dict[str, int], mode: str = "L") -> Path:
    """Folders of so many pictures each."""
    number = sum(1 for _ in root.rglob("*.*")) if root.exists() else 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture(number := number + 1, mode).save(root / name / f"{k}.png")
    return root


def load(root: Path, split: str = "background", **options: Any) -> ImageSet:
    return Source("folder", root, root.parent / "cache", options).load(split)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits of three classes with two grey pictures each."""
    splits = {f"{split}/{letter}{split[0]}": 2 for split in ("background", "evaluation") for letter in "abc"}
    return fill(tmp_path / "root", splits)


def test_the_page_on_data(run: Run) -> None:
    """What docs/data.md shows, run as it stands there, learns better than the untrained network beside it."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    exec(shown("data.md", "pictures"), {})  # noqa: S102 (our own documentation)
    listed = text.split("<!-- commands -->\n")[1].partition("\n\n")[0]
    commands = [line.split()[1:] for line in listed.splitlines()]
    names: dict[str, Any] = {
        "mrcl_classification.py": mrcl_classification,
        "evaluate_classification.py": evaluate_classification,
        "tools.analyze_representation": analyze_representation,
    }
    for name, *flags in commands:
        name, *flags = flags if name == "-m" else [name, *flags]
        run(names.pop(name), *flags, "--threads=1")
    assert not names
    results = json.loads(Path("runs/Omni_test_traj_0/results.json").read_text())
    ((classes, test),) = ((line["classes"], line["test"]) for line in results["summary"])
    (untrained,) = re.findall(r"an untrained network of this width, (\d+) %", text)
    assert (classes, len(results["evaluation_classes"])) == (10, 10)
    assert test > int(untrained) / 100, test


def test_a_loader_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of docs/data.md, of thirty lines, has flags and help and passes through training and meta-test."""
    text = shown("data.md", "loader")
    assert len(text.splitlines()) <= 32
    Path("arrays.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import arrays  # type: ignore[import-not-found]

    monkeypatch.setitem(DATASETS, "arrays", arrays.load)
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 28, 28), np.uint8)
    np.savez("images.npz", images=images, labels=np.arange(200) % 10)
    data = ["--dataset=arrays", "--dataset-path=.", "--first_test_label=6", "--negative", "--threads=1"]
    run(mrcl_classification, *TINY, "--train_classes=6", *data, "--model_name=a.net", "--eval_every=2")
    run(evaluate_classification, *data, "--model=a.net", "--lr=0.01", "--runs=1", "--name=e")
    results = json.loads(Path("runs/e_0/results.json").read_text())
    assert (results["data"], [line["classes"] for line in results["summary"]]) == ("arrays evaluation", [4])
    expected = 255 - images[np.arange(200) % 10 < 6].astype(float)
    assert load_network("a.net").normalisation.mean == pytest.approx(expected.mean((0, 2, 3)))
    Path("images.npz").unlink()
    with pytest.raises(UserError, match=r"--dataset arrays: cannot read .*images\.npz: No such file"):
        run(mrcl_classification, *TINY, *data)
    with pytest.raises(SystemExit):
        run(mrcl_classification, "--help")
    assert "arrays: Images and labels of ROOT/images.npz" in " ".join(capsys.readouterr().out.split())


def test_classes_of_few_images_in_colour(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = MagicMock(side_effect=choose_backend)
    monkeypatch.setattr(evaluate_classification, "choose_backend", choose)
    fill(tmp_path / "own", {f"{k}": 6 for k in range(6)}, "RGB")
    data = ["--dataset=folder", "--dataset-path=own", "--evaluation_classes=3", "--threads=1"]
    run(mrcl_classification, *TINY, *data, "--train_classes=3", "--model_name=p.net")
    few = ["--train_images=4", "--test_images=2", "--lr=0.01", "--runs=1", "--model=p.net", "--backend=plain"]
    run(evaluate_classification, *data, *few, "--schedule=3", "--name=e")
    assert choose.call_args.args[-1].channels == 3, "backends are compared on the colours"
    (row,) = json.loads(Path("runs/e_0/results.json").read_text())["summary"]
    assert row["train"] * 12 == pytest.approx(round(row["train"] * 12))
    # Another number of classes kept may mean classes that were trained on.
    run(evaluate_classification, *data, "--evaluation_classes=4", *few, "--schedule=2", "--name=f")
    assert "trained with --evaluation_classes 3, and this is 4" in Path("runs/f_0/log.txt").read_text()
    for script, flags, message in (
        (evaluate_classification, few[2:], r"has 6 images, and 2 others .*--train_images 15 and --test"),
        (mrcl_classification, [], r"has 6 images.*--update_step 20: 20 of each"),
    ):
        with pytest.raises(UserError, match=rf"class \w+ {message}"):
            run(script, *data, *flags)


def pixels(colour: Colour, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (8, 6), colour if len(colour) > 1 else colour[0])


def turned() -> Image.Image:
    image = Image.new("L", (8, 6), 255)
    image.paste(0, (0, 0, 4, 6))
    image.getexif()[0x0112] = 6  # to be turned clockwise by a quarter
    return image


def palette() -> Image.Image:
    image = pixels((255, 0, 0)).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


@pytest.mark.parametrize(
    ("file", "image", "options", "expected"),
    [
        ("x.png", pixels((7,), "L"), {}, [7]),
        ("x.PNG", pixels((1,), "1"), {}, [255]),
        ("x.jpeg", pixels((7,), "L"), {}, [7]),
        ("x.bmp", pixels((9, 9, 9)), {}, [9]),
        ("x.tif", pixels((10, 200, 30)), {}, [10, 200, 30]),
        ("x.webp", pixels((0, 0, 0, 0), "RGBA"), {}, [255]),
        ("x.png", pixels((0, 0, 0, 0), "RGBA"), {}, [255]),
        ("x.png", pixels((0, 102), "LA"), {}, [153]),
        ("x.png", palette(), {}, [255]),
        ("x.gif", pixels((255, 0, 0)).convert("P"), {}, [255, 0, 0]),
        ("x.png", pixels((300,), "I;16"), {}, [1]),
        ("x.jpg", pixels((0, 0, 0, 0), "CMYK"), {}, [255]),
        ("x.png", pixels((10, 200, 30)), {"channels": 1}, [124]),
        ("x.png", pixels((7,), "L"), {"channels": 3}, [7, 7, 7]),
        ("x.png", turned(), {}, shrink(turned().transpose(Image.Transpose.ROTATE_270))[None]),
        ("x.png", picture(3, size=(700, 20)), {}, shrink(picture(3, size=(700, 20)))[None]),
    ],
)
def test_pictures_of_all_kinds(
    tmp_path: Path, file: str, image: Image.Image, options: dict[str, Any], expected: Any
) -> None:
    names = ("background/a", "background/b", "evaluation/c", "evaluation/d")
    root = fill(tmp_path / "root", {name: int(name[-1] > "a") for name in names})
    image.save(root / "background/a" / file, exif=image.getexif())
    shown = load(root, **options).images[0].numpy()
    wanted = expected if isinstance(expected, np.ndarray) else np.reshape(expected, (-1, 1, 1))
    np.testing.assert_array_equal(shown, np.broadcast_to(wanted, shown.shape))
    assert len(shown) == len(wanted)


def test_a_single_level_is_drawn_apart(tmp_path: Path) -> None:
    """By class, the same everywhere; a larger N keeps those of a smaller one, as do classes that join."""
    names = ["Grüße & more", "日本", "a b", *(f"n/{k}" for k in range(7))]
    root = fill(tmp_path / "root", dict.fromkeys(names, 1))
    drawn = {}
    for count in (2, 5):
        kept, others = (load(root, split, evaluation_classes=count) for split in ("evaluation", "background"))
        assert (len(kept), len(others)) == (count, 10 - count)
        assert {*kept.classes, *others.classes} == set(names)
        assert kept.notes["evaluation_classes"] == list(kept.classes) == sorted(kept.classes)
        drawn[count] = set(kept.classes)
    assert drawn[2] < drawn[5]
    assert set(load(root, "evaluation", evaluation_classes=5, data_seed=1).classes) != drawn[5]


def test_links_to_each_other_are_followed_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "own", {"a": 2, "b": 2})
    for one, other in ("ab", "ba"):
        (root / one / "link").symlink_to(root / other)
    sides = [load(root, split, evaluation_classes=2).classes for split in ("background", "evaluation")]
    assert {*sides[0], *sides[1]} == {"a", "b", "a/link", "b/link"}


def test_what_does_not_count_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where both splits are used, as in an evaluation: one start reads a folder once."""
    caplog.set_level(logging.INFO, "anml")
    (root / "background/ab/notes.txt").write_text("x")
    (root / "background/ab/.hidden.png").write_text("x")
    fill(root, {"other": 1})
    shutil.copy(root / "background/cb/1.png", root / "evaluation/ae/copy.png")
    source = Source("folder", root, root.parent / "cache")
    images, _ = (source.load(split) for split in ("evaluation", "background"))
    assert images.sizes == (3, 2, 2)
    assert [re.sub(r"^\S+: ", "", line) for line in warnings_of(caplog)] == [
        "2 files are no picture of a class: background/ab/notes.txt, other/0.png",
        "a leak, 1 pictures of meta-test classes are pictures of meta-training classes: "
        "evaluation/ae/copy.png is background/cb/1.png",
    ]


def remove(root: Path, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(root / folder)


def flat(root: Path) -> None:
    remove(root, "background")
    shutil.move(root / "evaluation", root / "x")


def other_names(root: Path) -> None:
    (root / "background").rename(root / "train")
    (root / "evaluation").rename(root / "test")


def plain(root: Path) -> None:
    for file in root.glob("background/*/*.png"):
        Image.new("L", (9, 9)).save(file)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda root: remove(root, "background", "evaluation"), {}, "holds no pictures (.png"),
        (shutil.rmtree, {}, "root: No such file or directory"),
        (lambda root: remove(root, "background/ab", "background/bb"), {}, "1 classes in background; to tell"),
        (lambda root: shutil.copytree(root / "background/ab", root / "evaluation/ab"), {}, "evaluation/: ab"),
        (other_names, {}, "holds test/, train/: splits are called background/ and evaluation/ here"),
        (flat, {}, "give --evaluation_classes N, how many of its 3 classes are kept for meta-test"),
        (flat, {"evaluation_classes": 2}, "1 classes in background with --evaluation_classes 2"),
        (flat, {"evaluation_classes": 4}, "--evaluation_classes 4: "),
        (lambda _: None, {"evaluation_classes": 2}, "drop --evaluation_classes"),
        (plain, {}, "all pixels are equal"),
    ],
)
def test_refusals(root: Path, damage: Callable[[Path], None], options: dict[str, Any], message: str) -> None:
    """One line, before a cache is written that would hide it the next time."""
    damage(root)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            load(root, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_cache_belongs_to_its_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the picture that changes is none of the few that are made anew before a cache is used."""
    monkeypatch.setattr(images, "SECONDS", -1)
    load(root)
    for number in range(6):
        picture(1000 + number).save(root / "background/ab/1.png")
        os.utime(root / "background/ab/1.png", ns=(number, number))
        expected = torch.from_numpy(shrink(picture(1000 + number)))
        assert torch.equal(load(root).images[1, 0], expected)
    assert len(list((root.parent / "cache").iterdir())) == 1


def test_statistics_are_those_of_the_background_and_go_into_meta_test(root: Path) -> None:
    fill(root, {"background/colour": 3}, "RGB")
    background, evaluation = load(root), load(root, "evaluation")
    values = background.images.double()
    found = background.normalisation
    assert found is not None
    assert found == evaluation.normalisation
    assert found.mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert found.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist())
    rows = background.pool("cpu").take(slice(None))
    assert rows.shape[1:] == (3, 28, 28)
    torch.testing.assert_close(rows.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std((0, 2, 3), correction=0), torch.ones(3))
    assert Normalisation.of(json.loads(json.dumps(found.arguments()))) == found
    for mean, std in ((3, [1]), ([0], [0]), ([1], None)):
        wrong = {"pixel_mean": mean, "pixel_std": std}
        with pytest.raises(ValueError, match="standard deviation"):
            Normalisation.of(wrong)


def test_a_model_says_what_it_has_not_seen(tmp_path: Path, models: Path, evaluate: Evaluate) -> None:
    """Light ink on dark paper, and meta-training classes of one image, which have no variance."""
    splits = {f"{split}/{letter}{split[0]}": 4 for split in ("background", "evaluation") for letter in "ab"}
    root = fill(tmp_path / "root", splits | {"background/c": 1})
    for path in root.rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) // 4).astype(np.uint8)).save(path)
    flags = "--train_images 3 --test_images 1 --schedule 2 --runs 1 --learner map --model ANML.net"
    run = evaluate(f"--dataset folder --dataset_path {root} {flags}")
    log = (run / "log.txt").read_text()
    assert log.count("folder root evaluation: light and dark seem to be exchanged") == 1
    assert "1 classes of one image are left out of the prior" in log
    (line,) = summarise(read_results(run).rows)
    assert line["diverged"] == 0
    for path in root.glob("background/*/[123].png"):
        path.unlink()
    with pytest.raises(UserError, match="--learner map: 2 of each class are needed"):
        evaluate(f"--dataset folder --dataset_path {root} {flags}")
