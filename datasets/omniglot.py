"""Omniglot (Lake et al. 2015) from `ROOT/omniglot-py/` and the like: extracted folders, zips, or a download.

All names, counts and pictures are checked before they are used. A message names the file that is wrong.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from datasets.cache import cached
from datasets.characters import CANVAS, CLASSES, DEFAULT_CLASSES, DRAWINGS
from datasets.decoding import DAMAGE, reason
from datasets.images import OMNIGLOT, SIZE, ImageSet, shrink
from utils.errors import UserError

log = logging.getLogger("anml")

DRAWING_NAME = re.compile(r"[^/]+/character\d\d/\d{4}_\d\d\.png")
NETWORK_TIMEOUT = 30.0  # seconds without a byte


class Drawing(NamedTuple):
    """One PNG file.

    Attributes:
        name: `Alphabet/character01/0709_01.png`.
        member: its path in the folder or zip.
        stamp: its size, and its modification time (ns) in a folder or its CRC-32 in a zip.
    """

    name: str
    member: str
    stamp: tuple[int, int]


def load(split: str, root: Path, cache_dir: Path) -> ImageSet:
    """Omniglot, which is downloaded where it is missing.

    It comes from `images_<split>/`, else its zip, in :func:`_places`, else a download.

    Args:
        split: `background` or `evaluation`; nothing of the other split is touched.
        root: as `torchvision.datasets.Omniglot` takes it, or the folder of the split's zip or folder.
        cache_dir: see :func:`datasets.cache.cached`.

    Returns:
        20 grey images of each class, sorted by alphabet, character and file name.

    Raises:
        UserError: the data is missing and cannot be downloaded, or incomplete, or damaged.
    """
    place = _find(split, root)
    try:
        with contextlib.nullcontext() if place.is_dir() else zipfile.ZipFile(place) as archive:
            found = _of_folder(place) if archive is None else _of_zip(archive)
            drawings = sorted(found, key=lambda drawing: drawing.name.split("/"))
            classes = _check(place, drawings, CLASSES[split])

            def make(positions: Sequence[int]) -> NDArray[np.uint8]:
                images = np.empty((len(positions), 1, SIZE, SIZE), np.uint8)
                for image, position in zip(images, positions, strict=True):
                    member = drawings[position].member
                    try:
                        image[0] = _decode(archive.read(member) if archive else (place / member).read_bytes())
                    except DAMAGE as error:
                        raise _fault(place, reason(error, "PNG"), member) from error
                return images

            key = hashlib.sha256(repr([(drawing.name, drawing.stamp) for drawing in drawings]).encode())
            images = cached(cache_dir, f"omniglot-{split}", key.hexdigest(), len(drawings), make)
    except DAMAGE as error:
        raise _fault(place, reason(error, "PNG")) from error
    return ImageSet(
        f"omniglot {split}",
        torch.from_numpy(images),
        (DRAWINGS,) * len(classes),
        classes,
        OMNIGLOT,
        DEFAULT_CLASSES[split],
    )


def _find(split: str, root: Path) -> Path:
    """The split's folder or zip under `root`, which is downloaded where neither is there."""
    try:
        places = _places(root)
        for place in places:
            if (folder := place / f"images_{split}").is_dir():
                return folder
            if os.path.lexists(archive := place / f"images_{split}.zip"):
                return archive
        archive = places[0] / f"images_{split}.zip"
        _download(split, archive)
    except OSError as error:
        raise UserError(f"cannot look into {root}: {error.strerror}; choose another root") from error
    return archive


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


def _of_folder(place: Path) -> Iterator[Drawing]:
    """The drawings of an extracted split.

    Any folders may lie between `place` and the alphabets: "Extract All" of `images_background.zip` makes
    `images_background/images_background`.
    """
    for folder, _, files in os.walk(place, followlinks=True):
        for file in filter(_is_drawing, files):
            path = Path(folder, file)
            status = path.stat()
            member = path.relative_to(place).as_posix()
            yield Drawing("/".join(path.parts[-3:]), member, (status.st_size, status.st_mtime_ns))


def _of_zip(archive: zipfile.ZipFile) -> Iterator[Drawing]:
    """The drawings of a zip, official or packed anew: any path may lead to `<alphabet>/`."""
    for info in archive.infolist():
        parts = info.filename.replace("\\", "/").split("/")  # some programs write backslashes
        if _is_drawing(parts[-1]):
            yield Drawing("/".join(parts[-3:]), info.filename, (info.file_size, info.CRC))


def _is_drawing(file_name: str) -> bool:
    """Tell pictures from the notes, thumbnails and hidden files that people and systems add."""
    return file_name.lower().endswith(".png") and not file_name.startswith(".")


def _check(place: Path, drawings: list[Drawing], classes: int) -> tuple[str, ...]:
    """Check names and counts of the sorted drawings, and return the classes' names, sorted."""
    files: defaultdict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        if not DRAWING_NAME.fullmatch(drawing.name):
            raise _fault(place, "not named ALPHABET/characterNN/NNNN_NN.png as in Omniglot", drawing.member)
        files[drawing.name.rpartition("/")[0]].append(drawing)
    for members in files.values():
        if len(members) != DRAWINGS:
            numbers = {int(drawing.name[-6:-4]) for drawing in members}
            absent = [f"_{k:02d}.png" for k in range(1, DRAWINGS + 1) if k not in numbers]
            raise _fault(
                place,
                f"{len(members)} drawings instead of {DRAWINGS}"
                + (f", {', '.join(absent)} missing" if absent else ""),
                members[0].member.rpartition("/")[0],
            )
    for character in files:
        before = f"{character[:-2]}{int(character[-2:]) - 1:02d}"
        if not before.endswith("00") and before not in files:
            raise _fault(place, f"{before} is missing or has no drawings")
    if len(files) != classes:
        alphabets = len({character.partition("/")[0] for character in files})
        raise _fault(
            place,
            f"{len(files)} characters in {alphabets} alphabets instead of {classes} characters",
        )
    return tuple(files)


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


def _fault(place: Path, what: str, member: str = "") -> UserError:
    where = f"{place}{'/' if place.is_dir() else ':'}{member}" if member else f"{place}"
    return UserError(f"{where}: {what}; restore it, or remove {place} to have Omniglot downloaded again")
