"""Omniglot (Lake et al. 2015) from `ROOT/omniglot-py/` and the like: extracted folders, zips, or a download.

Everything is checked before it is used, and what is wrong is named with the file it is wrong in.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
import os
import re
import socket
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.error import HTTPError

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from datasets.cache import cached
from datasets.characters import CANVAS, CLASSES, DEFAULT_CLASSES, DRAWINGS
from datasets.decoding import DAMAGE, progress, reason
from datasets.images import OMNIGLOT, SIZE, ImageSet, shrink
from utils.errors import UserError

log = logging.getLogger("anml")

FORMAT = "1: grey, 28x28 LANCZOS"
"""Part of the cache's key: change it with whatever happens to a picture on its way to the cache."""

DRAWING_NAME = re.compile(r"[^/]+/character\d\d/\d{4}_\d\d\.png")
NETWORK_TIMEOUT = 30.0  # seconds without a byte


class Drawing(NamedTuple):
    """One PNG file."""

    name: str  # `Alphabet/character01/0709_01.png`
    member: str  # where its source holds it
    size: int  # bytes
    stamp: int  # changes with the content: CRC-32 in a zip, modification time (ns) in a folder


class Source(Protocol):
    """Where the drawings of one split are."""

    path: Path

    def where(self, member: str) -> str:
        """Name a member in a message."""

    def scan(self) -> list[Drawing]:
        """List all PNG files. Raises one of DAMAGE."""

    def contents(self, drawings: Iterable[Drawing]) -> Iterator[tuple[Drawing, bytes]]:
        """Read the drawings' files. Raises UserError."""


def load(split: str, root: Path, cache_dir: Path) -> ImageSet:
    """Omniglot, which is downloaded where it is missing.

    It comes from `images_<split>/`, else its zip, in :func:`_places`, else a download.

    Args:
        split: `background` or `evaluation`; nothing of the other split is touched.
        root: as `torchvision.datasets.Omniglot` takes it, or the folder of the split's zip or folder.
        cache_dir: see :func:`datasets.cache.cached`.

    Returns:
        20 grey images of each class, sorted by alphabet, character and file name. The manifest is
        a hash of sorted file names and sizes, the same for folders and for zips however packed.

    Raises:
        UserError: the data is missing and cannot be downloaded, or incomplete, or damaged.
    """
    source = _find(split, root)
    try:
        drawings = sorted(source.scan(), key=lambda drawing: drawing.name.split("/"))
    except DAMAGE as error:
        raise _fault(source, reason(error, "PNG")) from error
    characters = _check(source, drawings, CLASSES[split])
    manifest = hashlib.sha256()
    key = hashlib.sha256(f"{FORMAT}\n".encode())
    for name, _, size, stamp in drawings:
        manifest.update(f"{name} {size}\n".encode())
        key.update(f"{name} {size} {stamp}\n".encode())
    shape = (len(characters), DRAWINGS, SIZE, SIZE)
    images = cached(
        cache_dir,
        f"omniglot-{split}",
        key.hexdigest(),
        shape,
        lambda: _decode_all(source, drawings).reshape(shape),
    )
    return ImageSet(
        f"omniglot {split}",
        torch.from_numpy(images).reshape(-1, 1, SIZE, SIZE),
        (DRAWINGS,) * len(characters),
        characters,
        manifest.hexdigest(),
        OMNIGLOT,
        DEFAULT_CLASSES[split],
    )


def _find(split: str, root: Path) -> Source:
    """Return the split's folder or zip under `root`, which is downloaded if neither is there."""
    try:
        places = _places(root)
        for place in places:
            if (folder := place / f"images_{split}").is_dir():
                return _Folder(folder)
            if os.path.lexists(archive := place / f"images_{split}.zip"):
                return _Archive(archive)
        archive = places[0] / f"images_{split}.zip"
        _download(split, archive)
    except OSError as error:
        raise UserError(f"cannot look into {root}: {error.strerror}; choose another root") from error
    return _Archive(archive)


def _places(root: Path) -> list[Path]:
    """Where the splits may be if users point at `root`; the first is where a download goes.

    `root` may hold `omniglot-py/`, as in torchvision, or be that folder, or a split's folder or zip in
    it; or hold or be the authors' repository, which has the zips in `python/`.
    """
    while root.absolute().stem in [f"images_{split}" for split in CLASSES]:
        root = root.absolute().parent
    home = root if root.absolute().name == "omniglot-py" else root / "omniglot-py"
    others = ("python", "omniglot*", "omniglot*/python", "omniglot*/omniglot*", "omniglot*/omniglot*/python")
    return [home, root, *(place for pattern in others for place in sorted(root.glob(pattern)))]


def _download(split: str, archive: Path) -> None:
    """Download and md5-check a split's official zip; `archive` appears complete or not at all."""
    # Only here: torchvision takes a second to import, and a start from the cache does without.
    import torchvision.datasets

    # Whatever is unfinished stays in a temporary folder on the same disk, and goes with it.
    nearest = next(parent for parent in archive.absolute().parents if parent.exists())
    log.info("downloading Omniglot's %s split to %s", split, archive)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        with (
            tempfile.TemporaryDirectory(
                prefix=".omniglot-", dir=nearest, ignore_cleanup_errors=True
            ) as temporary,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            torchvision.datasets.Omniglot(temporary, background=split == "background", download=True)
            archive.parent.mkdir(parents=True, exist_ok=True)
            Path(temporary, "omniglot-py", archive.name).replace(archive)
    except (*DAMAGE, http.client.HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise UserError(
            f"{archive} is missing and cannot be downloaded ({reason(error)}); connect to the "
            "network, put the zip there, or give with --dataset-path a root that has omniglot-py/"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


class _Folder:
    """An extracted split: `<alphabet>/<character>/<file>.png`, perhaps a folder or two deeper."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, member: str) -> str:
        return str(self.path / member)

    def scan(self) -> list[Drawing]:
        drawings = []
        # "Extract All" of images_background.zip makes images_background/images_background.
        above = (self.path.glob(f"{deeper}*/character01/[0-9]*.png") for deeper in ("", "*/", "*/*/"))
        top = next((found.parents[2] for paths in above for found in sorted(paths)), self.path)
        inside = "".join(f"{folder}/" for folder in top.relative_to(self.path).parts)
        for alphabet in _folders(top):
            for character in _folders(alphabet.path):
                with os.scandir(character.path) as files:
                    for file in files:
                        if _is_drawing(file.name):
                            status = file.stat()
                            name = f"{alphabet.name}/{character.name}/{file.name}"
                            member = inside + name
                            drawings.append(Drawing(name, member, status.st_size, status.st_mtime_ns))
        return drawings

    def contents(self, drawings: Iterable[Drawing]) -> Iterator[tuple[Drawing, bytes]]:
        for drawing in drawings:
            try:
                content = (self.path / drawing.member).read_bytes()
            except OSError as error:
                raise _fault(self, reason(error, "PNG"), drawing.member) from error
            yield drawing, content


class _Archive:
    """A zip of a split, official or packed anew: any path may lead to `<alphabet>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, member: str) -> str:
        return f"{self.path}:{member}"

    def scan(self) -> list[Drawing]:
        with zipfile.ZipFile(self.path) as archive:
            return [
                Drawing("/".join(parts[-3:]), info.filename, info.file_size, info.CRC)
                for info in archive.infolist()
                # Some programs write backslashes.
                if _is_drawing((parts := re.split(r"[/\\]", info.filename))[-1])
            ]

    def contents(self, drawings: Iterable[Drawing]) -> Iterator[tuple[Drawing, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            for drawing in drawings:
                try:
                    content = archive.read(drawing.member)
                except DAMAGE as error:
                    raise _fault(self, reason(error, "PNG"), drawing.member) from error
                yield drawing, content


def _folders(path: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return [entry for entry in entries if entry.is_dir()]


def _is_drawing(file_name: str) -> bool:
    """Tell pictures from the notes, thumbnails and hidden files that people and systems add."""
    return file_name.lower().endswith(".png") and not file_name.startswith(".")


def _check(source: Source, drawings: list[Drawing], classes: int) -> tuple[str, ...]:
    """Check names and counts of the sorted drawings, and return the characters' names, sorted."""
    files: defaultdict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        if not DRAWING_NAME.fullmatch(drawing.name):
            raise _fault(source, "not named ALPHABET/characterNN/NNNN_NN.png as in Omniglot", drawing.member)
        files[drawing.name.rpartition("/")[0]].append(drawing)
    for members in files.values():
        if len(members) != DRAWINGS:
            numbers = {int(drawing.name[-6:-4]) for drawing in members}
            absent = [f"_{k:02d}.png" for k in range(1, DRAWINGS + 1) if k not in numbers]
            raise _fault(
                source,
                f"{len(members)} drawings instead of {DRAWINGS}"
                + (f", {', '.join(absent)} missing" if absent else ""),
                members[0].member.rpartition("/")[0],
            )
    for character in files:
        before = f"{character[:-2]}{int(character[-2:]) - 1:02d}"
        if not before.endswith("00") and before not in files:
            raise _fault(source, f"{before} is missing or has no drawings")
    if len(files) != classes:
        alphabets = len({character.partition("/")[0] for character in files})
        raise _fault(
            source,
            f"{len(files)} characters in {alphabets} alphabets instead of {classes} characters",
        )
    return tuple(files)


def _decode_all(source: Source, drawings: list[Drawing]) -> NDArray[np.uint8]:
    """Decode the drawings to uint8 `[N, 28, 28]`."""
    log.info("decoding %d images of %s, once", len(drawings), source.path)
    images = np.empty((len(drawings), SIZE, SIZE), np.uint8)
    read = progress(source.contents(drawings), len(drawings))
    for image, (drawing, content) in zip(images, read, strict=True):
        try:
            image[:] = _decode(content)
        except DAMAGE as error:
            raise _fault(source, reason(error, "PNG"), drawing.member) from error
    return images


def _decode(content: bytes) -> NDArray[np.uint8]:
    """Decode one PNG file to uint8 `[28, 28]`. Raises one of DAMAGE."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        if picture.size != (CANVAS, CANVAS):
            width, height = picture.size
            raise ValueError(f"{width} x {height} pixels instead of {CANVAS} x {CANVAS}")
        # Decoding alone ignores checksums, and verifying uses the picture up.
        picture.verify()
    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        return shrink(picture)


def _fault(source: Source, what: str, member: str = "") -> UserError:
    where = source.where(member) if member else str(source.path)
    return UserError(
        f"{where}: {what}; restore it, or remove {source.path} to have Omniglot downloaded again"
    )
