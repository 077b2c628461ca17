"""Characters drawn by fonts, those that come with matplotlib and changed copies of them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTCollection, TTFont  # type: ignore[import-untyped]

import evaluate_classification
import mrcl_classification
from datasets import Source, fonts
from datasets.images import ImageSet
from datasets.task_sampler import sample_task
from tests.conftest import TINY, Call, Run, warnings_of

TTF = Path(matplotlib.get_data_path()) / "fonts/ttf"
SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "cmr10", "cmtt10")
LETTERS = "ABDEFGHKMNRZ"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six fonts in two folders, and twelve letters."""
    for number, name in enumerate(SANS):
        folder = tmp_path / "fonts" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(TTF / f"{name}.ttf", folder)
    (tmp_path / "letters").write_text(f"{LETTERS}\n{LETTERS} ", encoding="utf-8-sig")
    return tmp_path / "fonts"


def load(root: Path, split: str = "evaluation", size: int = 28, **options: Any) -> ImageSet:
    options = {"characters": str(root.parent / "letters"), "images": 6, **options}
    return Source("fonts", root, root.parent / "cache", options, size).load(split)


def images_of(found: ImageSet) -> dict[str, torch.Tensor]:
    return dict(zip(found.classes, found.images.split(found.sizes), strict=True))


def edit(source: Path, target: Path, characters: str, glyph: str) -> None:
    """A copy of a font that shows a glyph in place of some characters."""
    font = TTFont(source)
    for table in font["cmap"].tables:
        table.cmap.update((ord(c), glyph) for c in characters if ord(c) in table.cmap)
    font.save(target)


@pytest.mark.parametrize(("name", "count", "ends"), [("hangul", 2350, "가힝"), ("kanji", 2965, "一龍")])
def test_characters_of_the_standards(name: str, count: int, ends: str) -> None:
    found = fonts._characters(name)
    assert (len(found), found[0] + found[-1]) == (count, ends)


def test_letters_that_look_alike_are_one_class() -> None:
    latin = "".join(fonts._characters("latin"))
    assert len(latin) == 253
    assert not set("oΟАВ") & set(latin)  # noqa: RUF001
    assert set("AaÄßΩЖ") < set(latin)


def test_drawings_are_in_the_box_of_omniglot(root: Path) -> None:
    for size in (28, 84):
        for split in ("background", "evaluation"):
            found = load(root, split, size)
            assert (len(found), set(found.sizes)) == (6, {6})
            ink = found.images[:, 0].numpy() < 128
            spans = [np.flatnonzero(image.any(axis)) for image in ink for axis in (0, 1)]
            sides = np.array([span[-1] - span[0] + 1 for span in spans]).reshape(-1, 2) * 28 / size
            middles = np.array([(span[0] + span[-1] + 1) / 2 for span in spans]).reshape(-1, 2) * 28 / size
            assert sides.max(1).mean() == pytest.approx(18, abs=0.5)
            assert middles.mean(0) == pytest.approx([13.6, 13.5], abs=0.2 if size > 28 else 0.4)
    first, second = ({*load(root, split).classes} for split in ("background", "evaluation"))
    assert {name[-1] for name in first | second} == set(LETTERS)
    assert not first & second
    assert load(root, data_seed=1).classes != load(root).classes
    assert len(load(root, evaluation_classes=3)) == 3
    assert load(root).notes["fonts"][0].startswith("a/DejaVuSans.ttf, Version 2.")


def test_what_does_not_count(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Copies, whole and of one letter; blank glyphs, boxes for missing characters, and placeholders."""
    caplog.set_level(logging.INFO, "anml")
    shutil.copy(root / "a/DejaVuSans.ttf", root / "b/copy.ttf")
    edit(TTF / "cmss10.ttf", root / "b/blank.ttf", "A", "space")
    edit(TTF / "cmb10.ttf", root / "b/boxes.ttf", "B", ".notdef")
    edit(TTF / "STIXGeneral.ttf", root / "b/holders.ttf", LETTERS, "percent")
    edit(TTF / "DejaVuSansMono.ttf", root / "b/twins.ttf", "E", "F")
    sizes: dict[str, int] = {}
    for split in ("background", "evaluation"):
        found = load(root, split, images=2)
        sizes |= {name[-1]: size for name, size in zip(found.classes, found.sizes, strict=True)}
    assert sizes == dict.fromkeys(LETTERS, 9) | {"A": 8, "B": 8, "F": 8}
    assert "9 different fonts of 11 draw 12 of 12 characters often enough" in caplog.text
    assert caplog.text.count("preparing 131 images, once") == 1
    (line,) = {*warnings_of(caplog)}
    assert line == "fonts that draw no pixels of their own do not count: b/copy.ttf, b/holders.ttf"


def test_collections_have_several_fonts(root: Path) -> None:
    collection = TTCollection()
    collection.fonts = [TTFont(TTF / f"{name}.ttf") for name in ("cmss10", "cmb10")]
    collection.save(root / "a/two.ttc")
    found = load(root)
    assert set(found.sizes) == {8}
    assert [name.split(",")[0] for name in found.notes["fonts"]][3:5] == ["a/two.ttc#0", "a/two.ttc#1"]


def test_held_out_fonts_make_the_test_images_alone(root: Path) -> None:
    options: dict[str, Any] = {"images": 4, "held_out_fonts": 2}
    background, evaluation = (load(root, split, **options) for split in ("background", "evaluation"))
    assert (set(background.sizes), set(evaluation.sizes), evaluation.test_only) == ({4}, {6}, 2)
    alone: dict[str, torch.Tensor] = {}
    for name in evaluation.notes["fonts_held_out"]:
        (root.parent / "held" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, root.parent / "held" / name)
    for split in ("background", "evaluation"):
        alone |= images_of(load(root.parent / "held", split, images=2))
    for found in (background, evaluation):
        for name, shown in images_of(found).items():
            assert torch.equal(shown[4:], alone[name][: len(shown) - 4])
            assert not any(torch.equal(one, other) for one in shown[:4] for other in alone[name])
    for split in ("random", "dataset"):
        generator = torch.Generator().manual_seed(0)
        task = sample_task(
            *(evaluation.sizes, 6, generator), train_images=3, test_images=1, split=split, test_only=2
        )
        assert task.train[..., 1].max() < 4 <= task.test[..., 1].min()


def test_from_training_to_meta_test(root: Path, run: Run, call: Call) -> None:
    data = ["--dataset=fonts", f"--dataset-path={root}", f"--characters={root.parent / 'letters'}"]
    data += ["--images=4", "--held_out_fonts=2", "--threads=1"]
    run(mrcl_classification, *TINY, "--steps=2", "--train_classes=6", *data, "--model_name=f.net")
    tests = ["--model=f.net", "--lr=0.01", "--runs=1", "--train_images=4", "--name=e"]
    run(evaluate_classification, *data, *tests, "--test_images=2")
    found = json.loads(Path("runs/e_0/results.json").read_text(encoding="utf-8"))
    assert [row["classes"] for row in found["summary"]] == [6]
    assert len(found["fonts_held_out"]) == 2
    done = call(evaluate_classification, *data, *tests, "--test_images=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "keeps 2 images of each class for tests" in done.stderr


def damaged(root: Path) -> None:
    for path in root.rglob("*.ttf"):
        path.write_bytes(path.read_bytes()[:999])


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (shutil.rmtree, {}, "no such folder; `sudo apt install fonts-dejavu "),
        (damaged, {}, "holds no font that opens with one of the characters; `sudo apt install fonts-"),
        (lambda _: None, {"characters": "hangul"}, "apt install fonts-alee fonts-baekmuk fonts-nanum "),
        (lambda _: None, {"characters": "kanji"}, "with one of the characters; `sudo apt install fonts-ao"),
        (lambda _: None, {"characters": "Hangul"}, "No such file or directory; choose hangul, kanji, latin"),
        (lambda root: (root.parent / "letters").write_bytes(b"\xff"), {}, "letters is not text"),
        (lambda root: (root.parent / "letters").write_text("A"), {}, "1 of 1 characters, too few for 0"),
        (lambda _: None, {"images": 7}, "0 of 12 characters, too few for 0 meta-test classes and others, "),
        (lambda _: None, {"images": 7}, "no character is drawn by more than 6; `sudo apt install"),
        (lambda _: None, {"held_out_fonts": 1}, "are drawn by --images 6 and --held_out_fonts 1 of its 6"),
        (lambda _: None, {"evaluation_classes": 11}, "too few for 11 meta-test classes"),
    ],
)
def test_refusals(root: Path, damage: Any, options: dict[str, Any], message: str, call: Call) -> None:
    damage(root)
    flags = {"characters": root.parent / "letters", "images": 6} | options
    data = ["--dataset=fonts", f"--dataset-path={root}", *(f"--{k}={v}" for k, v in flags.items())]
    done = call(mrcl_classification, *TINY, *data)
    assert (done.returncode, done.stderr.rstrip().count("\n")) == (2, 0), done.stderr
    assert message in done.stderr
    assert not Path("runs").exists()


def test_a_damaged_font_is_left_out_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "a/broken.ttf").write_bytes((root / "a/cmr10.ttf").read_bytes()[:2000])
    (root / "a/empty.OTF").touch()
    (root / "a/readme.txt").touch()
    assert set(load(root).sizes) == {6}
    (line,) = warnings_of(caplog)
    assert "2 font files are damaged and left out: a/broken.ttf (" in line
    assert "a/empty.OTF (" in line
