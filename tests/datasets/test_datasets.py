"""Characters: Omniglot from every source it comes in, with every fault it can have, and glyphs."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Omniglot

from datasets import OMNIGLOT, ImageSet, Source, glyphs, load_images, omniglot
from datasets.cache import cached
from datasets.characters import CLASSES
from datasets.images import shrink
from utils.errors import UserError

CHARACTERS = tuple(f"{a}/character{c:02d}" for a in ("Alpha", "Beta") for c in (1, 2, 3))
REAL_ROOT = Path(os.environ.get("ANML_OMNIGLOT_ROOT", Path(__file__).resolve().parents[2].parent / "shared"))


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anml")


@pytest.fixture
def few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make six characters a complete split."""
    for split in CLASSES:
        monkeypatch.setitem(CLASSES, split, len(CHARACTERS))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a split of six characters whose drawings all differ, as Omniglot stores them."""
    folder = tmp_path_factory.mktemp("template")
    rng = np.random.default_rng(0)
    for number, character in enumerate(CHARACTERS, start=1):
        (folder / character).mkdir(parents=True)
        for drawer in range(1, 21):
            picture = np.full((105, 105), 255, np.uint8)
            for top, left in rng.integers(5, 80, (3, 2)):
                picture[top : top + 20, left : left + 4] = 0
            file = folder / character / f"{number:04d}_{drawer:02d}.png"
            Image.fromarray(picture).convert("1").save(file)
    return folder


@pytest.fixture
def root(tmp_path: Path, template: Path, few_classes: None) -> Path:
    """A root with the background split as folders."""
    shutil.copytree(template, tmp_path / "root" / "omniglot-py" / "images_background")
    return tmp_path / "root"


def folder_of(root: Path) -> Path:
    return root / "omniglot-py" / "images_background"


def archive_of(root: Path) -> Path:
    return root / "omniglot-py" / "images_background.zip"


def pack(
    folder: Path, archive: Path, *, prefix: str = "images_background/", directories: bool = False
) -> None:
    """Zip a split, in reversed order so that nothing relies on the order of entries."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            if directories or path.is_file():
                file.write(path, prefix + path.relative_to(folder).as_posix())


def to_zip(root: Path) -> Path:
    """Replace a root's folder by a zip of it."""
    pack(folder_of(root), archive_of(root))
    shutil.rmtree(folder_of(root))
    return archive_of(root)


def load(root: Path, cache_dir: Path | None = None) -> ImageSet:
    return load_images(Source("omniglot", root, cache_dir or root.parent / "cache"), "background")


def refused(root: Path) -> str:
    """Load, and return the one line that it fails with; nothing may have been written."""
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        load(root)
    assert sorted(root.parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    assert " object at 0x" not in message
    return message


def test_folders(root: Path, template: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder_of(root) / "Alpha" / "character01" / ".DS_Store").write_bytes(b"x")
    (folder_of(root) / "Alpha" / "character01" / "._0001_01.png").write_bytes(b"x")
    (folder_of(root) / "README").write_text("notes do not matter")
    characters = load(root)
    assert characters.classes == CHARACTERS
    assert characters.images.shape == (6 * 20, 1, 28, 28)
    assert characters.images.dtype == torch.uint8
    for index, drawer in ((0, 0), (2, 7), (5, 19)):
        file = template / CHARACTERS[index] / f"{index + 1:04d}_{drawer + 1:02d}.png"
        released = np.asarray(Image.open(file).convert("RGB").resize((28, 28), Image.Resampling.LANCZOS))
        for channel in range(3):
            assert np.array_equal(characters.images[20 * index + drawer, 0].numpy(), released[..., channel])
    assert f"6 classes of 20 grey images, manifest {characters.manifest}" in caplog.text


@pytest.mark.parametrize("directories", [False, True])
@pytest.mark.parametrize("prefix", ["images_background/", "", "python/images_background/"])
def test_a_zip_however_packed_equals_the_folders(root: Path, prefix: str, directories: bool) -> None:
    from_folders = load(root)
    pack(folder_of(root), archive_of(root), prefix=prefix, directories=directories)
    shutil.rmtree(folder_of(root))
    from_zip = load(root)
    assert torch.equal(from_zip.images, from_folders.images)
    assert from_zip.manifest == from_folders.manifest
    assert from_zip.classes == from_folders.classes
    assert not folder_of(root).exists(), "a zip is read in memory"


def test_the_other_split_is_not_touched(root: Path) -> None:
    archive_of(root).with_name("images_evaluation.zip").write_bytes(b"broken")
    load(root)


def test_manifest_follows_the_content(root: Path) -> None:
    before = load(root).manifest
    victim = folder_of(root) / "Beta" / "character03" / "0006_20.png"
    Image.new("1", (105, 105), 1).save(victim)
    assert load(root).manifest != before


def garbage(file: Path) -> None:
    file.write_bytes(b"not a picture")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    file.write_bytes(content)


def small(file: Path) -> None:
    Image.new("1", (28, 28)).save(file)


def nameless(file: Path) -> None:
    file.rename(file.with_name("drawing.png"))


def without_character(file: Path) -> None:
    shutil.rmtree(file.parent)


def without_alphabet(file: Path) -> None:
    shutil.rmtree(file.parent.parent)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (garbage, "/Beta/character02/0005_07.png", "not a PNG picture"),
        (cut, "/Beta/character02/0005_07.png", ""),
        (flip, "/Beta/character02/0005_07.png", ""),
        (small, "/Beta/character02/0005_07.png", "28 x 28 pixels instead of 105 x 105"),
        (nameless, "/Beta/character02/drawing.png", "not named"),
        (Path.unlink, "/Beta/character02:", "19 drawings instead of 20, _07.png missing"),
        (without_character, "", "Beta/character02 is missing"),
        (without_alphabet, "", "3 characters in 1 alphabets instead of 6"),
    ],
)
def test_a_fault_is_named_with_its_file(
    root: Path, damage: Callable[[Path], None], where: str, what: str, packed: bool
) -> None:
    damage(folder_of(root) / "Beta" / "character02" / "0005_07.png")
    source = f"{to_zip(root)}" if packed else f"{folder_of(root)}"
    separator = ":images_background" if packed and where else ""
    message = refused(root)
    assert f"{source}{separator}{where}" in message
    assert what in message
    assert "restore it" in message


def test_wrong_number_of_characters(root: Path) -> None:
    extra = folder_of(root) / "Beta" / "character04"
    shutil.copytree(folder_of(root) / "Beta" / "character03", extra)
    assert "7 characters in 2 alphabets instead of 6" in refused(root)


def test_an_empty_folder_is_not_replaced_by_a_download(tmp_path: Path) -> None:
    folder_of(tmp_path / "root").mkdir(parents=True)
    assert "0 characters" in refused(tmp_path / "root")


def test_unreadable_drawings(root: Path) -> None:
    victim = folder_of(root) / "Alpha" / "character01" / "0001_01.png"
    victim.unlink()
    victim.symlink_to("nowhere")
    assert f"{folder_of(root)}: No such file" in refused(root)
    victim.unlink()
    victim.mkdir()
    assert f"{victim}: Is a directory" in refused(root)


def test_damaged_zips(root: Path) -> None:
    archive = to_zip(root)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert f"{archive}: " in refused(root)
    assert archive.stat().st_size == len(whole) // 2, "what is there is never downloaded over"
    archive.write_bytes(b"")
    assert f"{archive}: " in refused(root)

    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no drawings")
    assert "0 characters" in refused(root)

    archive.unlink()
    archive.mkdir()
    assert f"{archive}: Is a directory" in refused(root)


def test_a_wrong_checksum_in_a_zip(root: Path) -> None:
    archive = to_zip(root)
    with zipfile.ZipFile(archive) as file:
        victim = file.infolist()[50]
    content = bytearray(archive.read_bytes())
    content[victim.header_offset + 30 + len(victim.filename) + victim.compress_size // 2] ^= 255
    archive.write_bytes(content)
    assert f"{archive}:{victim.filename}: " in refused(root)


def test_a_second_start_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "_decode", lambda _: pytest.fail("decoded again"))
        second = load(root)
    assert torch.equal(first.images, second.images)
    assert first.manifest == second.manifest

    # Another content under the same names and sizes does not meet the old cache.
    file = folder_of(root) / "Alpha" / "character01" / "0001_01.png"
    flip(file)
    os.utime(file, ns=(0, 0))
    with pytest.raises(UserError, match=r"0001_01\.png"):
        load(root)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda _: b"",
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"\x80\x04N." + content,
    ],
)
def test_a_damaged_cache_is_rebuilt(
    root: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    first = load(root)
    (file,) = (root.parent / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    caplog.clear()
    assert torch.equal(load(root).images, first.images)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(file) in warning
    assert file.read_bytes() == whole


def test_a_cache_for_another_key_or_shape_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zeros, ones = np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)
    cached(tmp_path, "x", "a" * 64, (2, 3), lambda: zeros)
    (file,) = tmp_path.iterdir()
    other_key = "a" * 16 + "b" * 48
    assert np.array_equal(cached(tmp_path, "x", other_key, (2, 3), lambda: ones), ones)
    assert np.array_equal(cached(tmp_path, "x", other_key, (3, 2), lambda: ones.T), ones.T)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_written_only_warns(
    root: Path, below: str, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = root.parent / "file"
    blocked.write_text("in the way")
    images = load(root, blocked / below).images
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(blocked) in warning
    assert torch.equal(images, load(root).images)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror(
    tmp_path: Path, template: Path, few_classes: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A server on this machine in place of Omniglot's; its folder, with one zip."""
    served = tmp_path / "served"
    served.mkdir()
    archive = served / "images_background.zip"
    pack(template, archive)
    handler = partial(QuietHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(Omniglot, "download_url_prefix", url)
        md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(Omniglot.zips_md5, "images_background", md5)
        yield served
        server.shutdown()
        thread.join()


def test_download(tmp_path: Path, mirror: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "new" / "root"
    images = load(root, tmp_path / "cache").images
    assert sorted(root.rglob("*")) == [root / "omniglot-py", archive_of(root)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "new", "served"]
    assert archive_of(root).read_bytes() == (mirror / "images_background.zip").read_bytes()
    assert capfd.readouterr() == ("", "")

    (mirror / "images_background.zip").unlink()
    assert torch.equal(load(root, tmp_path / "elsewhere").images, images)


@pytest.mark.parametrize("fault", ["damaged", "absent"])
def test_a_failed_download_leaves_nothing(tmp_path: Path, mirror: Path, fault: str) -> None:
    if fault == "damaged":
        cut(mirror / "images_background.zip")
    else:
        (mirror / "images_background.zip").unlink()
    message = refused(tmp_path / "new" / "root")
    assert f"{archive_of(tmp_path / 'new' / 'root')} is missing" in message
    assert "root that has omniglot-py/" in message


@pytest.mark.parametrize("exists", [False, True])
def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    monkeypatch.setattr(Omniglot, "download_url_prefix", (tmp_path / "no-server").as_uri())
    root = tmp_path / "root"
    if exists:
        root.mkdir()
    assert f"{archive_of(root)} is missing and cannot be downloaded" in refused(root)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("not a folder")
    assert str(root) in refused(root)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("place", "pointed_at"),
    [
        ("omniglot-py", "omniglot-py"),
        ("omniglot-py", "omniglot-py/images_background"),
        ("omniglot-py", "omniglot-py/images_evaluation.zip"),
        ("omniglot-py/omniglot-py", "omniglot-py"),
        ("", ""),
        ("python", ""),
        ("omniglot/python", ""),
        ("omniglot-master/omniglot-master/python", ""),
        ("omniglot", ""),
    ],
)
def test_places_that_users_point_at(root: Path, place: str, pointed_at: str, packed: bool) -> None:
    manifest = load(root).manifest
    source = to_zip(root) if packed else folder_of(root)
    (root / place).mkdir(parents=True, exist_ok=True)
    source.rename(root / place / source.name)
    assert load(root / pointed_at, root.parent / "other").manifest == manifest


def test_the_current_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (folder_of(root).parent, folder_of(root)):
        monkeypatch.chdir(folder)
        load(Path(), root.parent / "cache")


@pytest.mark.parametrize("deeper", ["images_background", "omniglot-py/images_background"])
def test_folders_that_unpacking_adds(root: Path, deeper: str) -> None:
    before = load(root)
    folder_of(root).rename(root / "unpacked")
    (folder_of(root) / deeper).parent.mkdir(parents=True)
    (root / "unpacked").rename(folder_of(root) / deeper)
    beside = folder_of(root) / "__MACOSX/images_background/Alpha/character01/._0001_01.png"
    beside.parent.mkdir(parents=True)
    beside.touch()
    after = load(root, root.parent / "other")
    assert torch.equal(after.images, before.images)
    assert (after.manifest, after.classes) == (before.manifest, before.classes)
    for point_at in (folder_of(root), folder_of(root) / "images_background"):
        assert load(point_at).manifest == before.manifest
    (folder_of(root) / deeper / "Beta/character02/0005_07.png").unlink()
    message = refused(root)
    assert f"{folder_of(root) / deeper}/Beta/character02: 19 drawings" in message
    assert f"remove {folder_of(root)} to have" in message


def test_a_zip_with_backslashes(root: Path) -> None:
    before = load(root)
    with zipfile.ZipFile(archive_of(root), "w") as file:
        for path in sorted(folder_of(root).rglob("*.png")):
            info = zipfile.ZipInfo()
            info.filename = str(path.relative_to(folder_of(root).parent)).replace("/", "\\")
            file.writestr(info, path.read_bytes())
    shutil.rmtree(folder_of(root))
    assert load(root).manifest == before.manifest


def test_a_download_goes_to_the_folder_pointed_at(tmp_path: Path, mirror: Path) -> None:
    load(tmp_path / "omniglot-py", tmp_path / "cache")
    assert archive_of(tmp_path).exists()


@pytest.mark.parametrize(
    ("dataset", "split", "seed"),
    [("mnist", "background", 0), ("glyphs", "test", 0), ("glyphs", "background", -1)],
)
def test_wrong_arguments(tmp_path: Path, dataset: str, split: str, seed: int) -> None:
    with pytest.raises(UserError, match="choose"):
        Source(dataset, tmp_path, tmp_path, {"glyph_seed": seed}).load(split)


def test_normalised() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(2 * 20 * 28 * 28 // 256 + 1)
    images = images[: 2 * 20 * 28 * 28].reshape(40, 1, 28, 28)
    characters = ImageSet("test", images, (20, 20), ("a", "b"), "", OMNIGLOT)
    exact = (images.numpy().astype(np.float64) - 0.92206 * 256) / (0.08426 * 256 * 256)
    mean, scale = np.float32(0.92206 * 256), np.float32(0.08426 * 256 * 256)
    expected = (images.numpy().astype(np.float32) - mean) / scale
    double = characters.pool("cpu", torch.float64).rows
    assert double.shape == (40, 1, 28, 28)
    assert np.array_equal(double.numpy(), expected)
    single = characters.pool("cpu").rows
    assert single.dtype == torch.float32
    assert np.array_equal(single.numpy(), expected)
    assert np.allclose(expected, exact, rtol=1e-6, atol=1e-8)
    assert characters.pool("meta").rows.shape == double.shape
    assert images.dtype == torch.uint8, "the set keeps its own images"


def test_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(cache: str = "cache", seed: int = 0) -> ImageSet:
        return Source("glyphs", tmp_path / "absent", tmp_path / cache, {"glyph_seed": seed}).load(
            "background"
        )

    monkeypatch.setitem(CLASSES, "background", 30)
    first = load()
    assert first.images.shape == (30 * 20, 1, 28, 28)
    assert first.images.dtype == torch.uint8
    assert len(first) == 30
    again = load("new")
    assert torch.equal(first.images, again.images)
    assert first.manifest == again.manifest
    other = load(seed=1)
    assert not torch.equal(first.images, other.images)
    assert first.manifest != other.manifest
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "draw", lambda *_: pytest.fail("drawn again"))
        load()


def test_glyphs_look_like_omniglot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "background", 60)
    monkeypatch.setitem(glyphs.ALPHABETS, "background", 2)
    images = glyphs.draw("background", 0).astype(np.float64) / 255
    assert len(np.unique(images.reshape(60 * 20, -1), axis=0)) == 60 * 20
    assert 0.90 < images.mean() < 0.94, "Omniglot: 0.92"
    assert 0.21 < images.std() < 0.27, "Omniglot: 0.24"
    assert images[..., [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.99, "ink is dark, paper white"

    train, test = images[:, :15].reshape(900, -1), images[:, 15:].reshape(300, -1)
    distance = (train**2).sum(1) - 2 * test @ train.T
    right = distance.argmin(1) // 15 == np.arange(300) // 5
    assert 0.3 < right.mean() < 0.65, "nearest neighbour on Omniglot, 50 classes: 0.50"


def test_glyph_names() -> None:
    background, evaluation = glyphs.names("background"), glyphs.names("evaluation")
    assert (len(background), len(evaluation)) == (964, 659)
    assert list(background) == sorted(background)
    assert list(evaluation) == sorted(evaluation)
    assert not set(background) & set(evaluation)
    for names, alphabets in ((background, 30), (evaluation, 20)):
        assert len({name.partition("/")[0] for name in names}) == alphabets
    assert glyphs.manifest("background", 0) != glyphs.manifest("evaluation", 0)


@pytest.mark.skipif(
    not (REAL_ROOT / "omniglot-py").is_dir(),
    reason=f"no Omniglot in {REAL_ROOT}; ANML_OMNIGLOT_ROOT names another root",
)
@pytest.mark.parametrize("split", ["background", "evaluation"])
def test_real_omniglot(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[bytes] = []

    def sample(source: omniglot.Source, drawings: list[omniglot.Drawing]) -> object:
        samples.extend(content for _, content in source.contents(drawings[::400]))
        return np.zeros((len(drawings), 28, 28), np.uint8)

    # All names and counts are checked; decoding all of it is left to the scripts.
    monkeypatch.setattr(omniglot, "_decode_all", sample)
    characters = Source("omniglot", REAL_ROOT, tmp_path).load(split)
    assert len(characters) == {"background": 964, "evaluation": 659}[split]
    alphabets = {name.partition("/")[0] for name in characters.classes}
    assert len(alphabets) == {"background": 30, "evaluation": 20}[split]
    for number, content in enumerate(samples):
        file = tmp_path / f"{number}.png"
        file.write_bytes(content)
        with Image.open(file) as picture:
            rgb = picture.convert("RGB").resize((28, 28), Image.Resampling.LANCZOS)
            for channel in rgb.split():
                assert np.array_equal(np.asarray(channel), shrink(picture))
