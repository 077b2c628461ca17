"""Characters: Omniglot from every source it comes in, with every fault it can have."""

import hashlib
import io
import logging
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datasets import Source, folder, glyphs, images, omniglot
from datasets.images import OMNIGLOT, ImageSet, cached
from datasets.omniglot import CLASSES
from tests.conftest import warnings_of
from utils.errors import UserError

CHARACTERS = tuple(f"{a}/character{c:02d}" for a in ("Alpha", "Beta") for c in (1, 2, 3))


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


def pack(folder: Path, archive: Path, *, prefix: str = "images_background/") -> None:
    """Zip a split, in reversed order so that nothing relies on the order of entries."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            info = zipfile.ZipInfo()  # as its constructor is given a name, it takes backslashes out
            info.filename = prefix + path.relative_to(folder).as_posix() + "/" * path.is_dir()
            if "\\" in prefix:
                info.filename = info.filename.replace("/", "\\")
            file.writestr(info, path.read_bytes() if path.is_file() else b"")


def to_zip(root: Path) -> Path:
    """Replace a root's folder by a zip of it."""
    pack(folder_of(root), archive_of(root))
    shutil.rmtree(folder_of(root))
    return archive_of(root)


def load(root: Path, cache_dir: Path | None = None) -> ImageSet:
    return Source("omniglot", root, cache_dir or root.parent / "cache").load("background")


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


def released(file: Path | io.BytesIO) -> NDArray[np.uint8]:
    """What the released code makes of a drawing, [3, 28, 28]."""
    rgb = Image.open(file).convert("RGB").resize((28, 28), Image.Resampling.LANCZOS)
    return np.moveaxis(np.asarray(rgb, np.uint8), 2, 0)


def test_folders(root: Path, template: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder_of(root) / "Alpha" / "character01" / ".DS_Store").write_bytes(b"x")
    (folder_of(root) / "Alpha" / "character01" / "._0001_01.png").write_bytes(b"x")
    (folder_of(root) / "README").write_text("notes do not matter")
    archive_of(root).with_name("images_evaluation.zip").write_bytes(b"broken")  # of the other split
    characters = load(root)
    assert characters.classes == CHARACTERS
    assert characters.images.shape == (6 * 20, 1, 28, 28)
    assert characters.images.dtype == torch.uint8
    for index, drawer in ((0, 0), (2, 7), (5, 19)):
        file = template / CHARACTERS[index] / f"{index + 1:04d}_{drawer + 1:02d}.png"
        assert np.array_equal(released(file), characters.images[20 * index + drawer].repeat(3, 1, 1))
    assert f"6 classes of 20 grey images, data hash {characters.data_hash}" in caplog.text


@pytest.mark.parametrize("prefix", ["", "python/images_background/", "images_background\\"])
def test_a_zip_however_packed_equals_the_folders(root: Path, prefix: str) -> None:
    from_folders = load(root)
    pack(folder_of(root), archive_of(root), prefix=prefix)
    shutil.rmtree(folder_of(root))
    assert load(root).data_hash == from_folders.data_hash
    assert not folder_of(root).exists(), "a zip is read in memory"


def test_omniglot_as_a_folder_is_omniglot(root: Path) -> None:
    (root / "own").mkdir()
    (root / "own/background").symlink_to(folder_of(root))
    (folder_of(root) / "loop").symlink_to(folder_of(root))
    own = Source("folder", root / "own", root.parent / "cache").load("background")
    assert own.data_hash == load(root).data_hash


def test_the_data_hash_is_one_of_names_sizes_and_pixels() -> None:
    pixels, sizes, names = torch.zeros((5, 1, 28, 28), dtype=torch.uint8), (2, 3), ("a", "b")
    images = ImageSet("x", pixels, sizes, names)
    same = ImageSet.of("y", {"a": pixels[:2, 0].numpy(), "b": pixels[2:]}, normalisation=OMNIGLOT)
    assert images.data_hash == same.data_hash == images.first(1).data_hash
    other = pixels.clone()
    other[4, 0, 27, 27] = 1
    changed = ((other, sizes, names), (pixels, (3, 2), names), (pixels, sizes, ("a", "c")))
    others = [*changed, (pixels.expand(-1, 3, -1, -1), sizes, names)]
    assert len({images.data_hash, *(ImageSet("x", *one).data_hash for one in others)}) == 5


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    file.write_bytes(content)


def with_another(file: Path) -> None:
    shutil.copytree(file.parent, file.parent.with_name("character04"))


def empty(file: Path) -> None:
    for alphabet in file.parents[2].iterdir():
        shutil.rmtree(alphabet)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (lambda file: file.write_text("x"), "/Beta/character02/0005_07.png", "not a picture"),
        (cut, "/Beta/character02/0005_07.png", ""),
        (flip, "/Beta/character02/0005_07.png", ""),
        (Image.new("1", (28, 28)).save, "/Beta/character02/0005_07.png", "28 x 28 pixels instead of 105"),
        (lambda file: file.rename(file.with_name("x.png")), "/Beta/character02/x.png", "not named"),
        (Path.unlink, "/Beta/character02:", "19 drawings instead of 20"),
        (lambda file: shutil.rmtree(file.parent), "", "5 characters in 2 alphabets instead of 6"),
        (with_another, "", "7 characters in 2 alphabets instead of 6"),
        (empty, "", "0 characters in 0 alphabets instead of 6"),
    ],
)
def test_a_fault_is_named_with_its_file(
    root: Path, damage: Callable[[Path], None], where: str, what: str, packed: bool
) -> None:
    damage(folder_of(root) / "Beta" / "character02" / "0005_07.png")
    source = f"{to_zip(root)}" if packed else f"{folder_of(root)}"
    separator = "/images_background" if packed and where else ""
    message = refused(root)
    assert f"{source}{separator}{where}" in message
    assert what in message
    assert "restore it" in message


def entries(archive: Path, field: int, value: bytes) -> None:
    """Change two bytes of all entries of the directory."""
    start = b"(?s)(PK\x01\x02.{%d}).." % (field - 4)
    archive.write_bytes(re.sub(start, lambda found: found[1] + value, archive.read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        *(cut, lambda archive: archive.write_bytes(b"")),
        lambda archive: entries(archive, 8, b"\1\0"),  # encrypted
        lambda archive: entries(archive, 10, b"\x63\0"),  # compressed in a way that nobody has
        lambda archive: entries(archive, 16, b"ab"),  # other checksums
    ],
)
def test_a_damaged_zip_is_not_replaced_by_a_download(root: Path, damage: Callable[[Path], None]) -> None:
    archive = to_zip(root)
    damage(archive)
    damaged = archive.read_bytes()
    assert str(archive) in refused(root)
    assert archive.read_bytes() == damaged


@pytest.mark.parametrize(
    ("dataset", "module", "name", "change"),
    [
        ("omniglot", images, "FILTER", lambda _: Image.Resampling.BOX),
        ("glyphs", images, "FILTER", lambda _: Image.Resampling.BILINEAR),
        ("glyphs", glyphs, "KNOT_NOISE", lambda noise: noise + 0.001),
        ("folder", folder, "_flat", lambda flat: lambda content: ImageOps.mirror(flat(content))),
    ],
)
def test_changed_code_prepares_images_anew(
    root: Path, dataset: str, module: Any, name: str, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A warm cache gives what the code as it stands makes, and one line says so."""
    path, options = (folder_of(root), {"evaluation_classes": 2}) if dataset == "folder" else (root, {})

    def load(cache: str = "cache") -> ImageSet:
        return Source(dataset, path, root.parent / cache, options).load("background")

    with pytest.MonkeyPatch.context() as patch:
        before = load()
        assert load().data_hash == before.data_hash
        assert warnings_of(caplog) == []
        patch.setattr(module, name, change(getattr(module, name)))
        after = load()
        (line,) = warnings_of(caplog)
        assert line.startswith("images_background" if dataset == "folder" else dataset)
        assert "the code that prepares images has changed" in line
        assert after.data_hash == load("fresh").data_hash != before.data_hash
        assert load().data_hash == after.data_hash
        assert warnings_of(caplog) == []


def test_a_cache_is_used_where_it_holds_the_same(tmp_path: Path) -> None:
    """No more than twenty images are made, the first and the last among them."""
    made: list[int] = []

    def make(positions: Sequence[int]) -> NDArray[np.uint8]:
        made.extend(positions)
        return np.arange(1200, dtype=np.uint16).astype(np.uint8)[list(positions), None]

    first = cached(tmp_path, "x", b"k", 1200, make)
    assert made == list(range(1200))
    made.clear()
    assert np.array_equal(cached(tmp_path, "x", b"k", 1200, make), first)
    assert {0, 1199} <= set(made)
    assert len(made) <= 20


def broken_pixel(content: bytes) -> bytes:
    at = content.index(b"images.npy") + 5000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


class Runs:
    """Ends the program where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("it was run",)


def pickled(_: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(["x"]), images=np.array([Runs()], object))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        broken_pixel,
        pickled,
        lambda content: content[: len(content) // 2],
        lambda _: b"",
        lambda _: b"\x80\x04N.",
    ],
)
def test_a_damaged_cache_is_built_again(
    root: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    first = load(root)
    (file,) = (root.parent / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert load(root).data_hash == first.data_hash
    (warning,) = warnings_of(caplog)
    assert str(file) in warning
    assert load(root).data_hash == first.data_hash
    assert warnings_of(caplog) == []


def test_a_cache_that_cannot_be_written_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root.parent / "file").write_text("no folder")
    images = load(root, root.parent / "file").images
    (warning,) = warnings_of(caplog)
    assert "every start prepares the images again" in warning
    assert torch.equal(images, load(root).images)


@pytest.fixture
def mirror(
    tmp_path: Path, template: Path, few_classes: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A server on this machine in place of Omniglot's; its folder, with one zip."""
    served = tmp_path / "served"
    served.mkdir()
    archive = served / "images_background.zip"
    pack(template, archive)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(omniglot.MD5, "background", md5)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(served))
    ) as server:
        monkeypatch.setattr(omniglot, "URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("pointed_at", ["", "omniglot-py"])
def test_download(tmp_path: Path, mirror: Path, pointed_at: str, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "new" / "root"
    images = load(root / pointed_at, tmp_path / "cache").images
    assert sorted(root.rglob("*")) == [root / "omniglot-py", archive_of(root)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "new", "served"]
    assert archive_of(root).read_bytes() == (mirror / "images_background.zip").read_bytes()
    assert capfd.readouterr() == ("", "")

    (mirror / "images_background.zip").unlink()
    assert torch.equal(load(root, tmp_path / "elsewhere").images, images)
    assert "is missing and cannot be downloaded" in refused(tmp_path / "omniglot-py")


def test_a_failed_download_leaves_nothing(tmp_path: Path, mirror: Path) -> None:
    cut(mirror / "images_background.zip")
    message = refused(tmp_path / "new" / "root")
    assert f"{archive_of(tmp_path / 'new' / 'root')} is missing" in message
    assert "root that has omniglot-py/" in message


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
def test_places_that_users_point_at(
    root: Path, place: str, pointed_at: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their names, and as the current folder."""
    data_hash = load(root).data_hash
    source = to_zip(root) if packed else folder_of(root)
    (root / place).mkdir(parents=True, exist_ok=True)
    source.rename(root / place / source.name)
    assert load(root / pointed_at, root.parent / "other").data_hash == data_hash
    if (root / pointed_at).is_dir():
        monkeypatch.chdir(root / pointed_at)
        assert load(Path(), root.parent / "other").data_hash == data_hash


@pytest.mark.parametrize("deeper", ["images_background", "omniglot-py/images_background"])
def test_folders_that_unpacking_adds(root: Path, deeper: str) -> None:
    before = load(root)
    folder_of(root).rename(root / "unpacked")
    (folder_of(root) / deeper).parent.mkdir(parents=True)
    (root / "unpacked").rename(folder_of(root) / deeper)
    for point_at in (root, folder_of(root), folder_of(root) / "images_background"):
        assert load(point_at).data_hash == before.data_hash
    (folder_of(root) / deeper / "Beta/character02/0005_07.png").unlink()
    message = refused(root)
    assert f"{folder_of(root) / deeper}/Beta/character02: 19 drawings" in message
    assert f"remove {folder_of(root)} to have" in message
