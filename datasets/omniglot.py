"""Omniglot (Lake et al. 2015) from `ROOT/omniglot-py/` and the like: extracted folders, zips, or a download.

All names, counts and pictures are checked before they are used. A message names the file that is wrong.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.cache import cached
from datasets.images import DAMAGE, OMNIGLOT, SIZE, ImageSet, open_picture, reason, shrink
from utils.errors import UserError, refusing
from utils.files import write_bytes

log = logging.getLogger("anml")

CLASSES = {"background": 964, "evaluation": 659}
"""Characters of each split of Omniglot (Lake et al. 2015)."""

DEFAULT_CLASSES = {"background": 963, "evaluation": 650}
"""Characters that the paper meta-trains on, and that the released code draws meta-tests from."""

DRAWINGS = 20  # of each character, each by another person
CANVAS = 105  # pixels, side of a drawing as published
DRAWING_NAME = re.compile(r"[^/]+/character\d\d/\d{4}_\d\d\.png")

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
"""Where the authors' zips are."""

MD5 = {"background": "68d2efa1b9178cc56df9314c21c6e718", "evaluation": "6b91aef0f799c5bb55b94e3f2daec811"}
TIMEOUT = 30.0  # seconds without a byte


class Drawing(NamedTuple):
    """One PNG file: its name, such as `Alphabet/character01/0709_01.png`, and its path in the folder or zip.

    Its stamp is its size with its modification time (ns) in a folder, or with its CRC-32 in a zip.
    """

    name: str
    member: str
    stamp: tuple[int, int]


def load(split: str, root: Path, cache_dir: Path) -> ImageSet:
    """Omniglot, which is downloaded where it is missing.

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
            drawings = sorted(_scan(place, archive), key=lambda drawing: drawing.name.split("/"))
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

            origin = repr([(drawing.name, drawing.stamp) for drawing in drawings]).encode()
            images = cached(cache_dir, f"omniglot-{split}", origin, len(drawings), make)
    except DAMAGE as error:
        raise _fault(place, reason(error, "PNG")) from error
    return characters(f"omniglot {split}", split, images, classes)


def characters(name: str, split: str, images: NDArray[np.uint8], classes: tuple[str, ...]) -> ImageSet:
    """The set of `images`, `[20 * C, 1, 28, 28]`, normalised and used as Omniglot's `split` is by default."""
    sizes = (DRAWINGS,) * len(classes)
    return ImageSet(name, torch.from_numpy(images), sizes, classes, OMNIGLOT, DEFAULT_CLASSES[split])


def _find(split: str, root: Path) -> Path:
    """The split's folder or zip under `root`, which is downloaded where neither is there."""
    with refusing(f"look into {root}", "; choose another root"):
        places = _places(root)
        for place in places:
            for found in (place / f"images_{split}", place / f"images_{split}.zip"):
                if os.path.lexists(found):
                    return found
    return _download(split, places[0] / f"images_{split}.zip")


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


def _download(split: str, archive: Path) -> Path:
    """Download a split's official zip to `archive`, which appears whole or not at all; returns `archive`."""
    from torchvision.datasets.utils import download_url  # a second to import, which other starts do without

    log.info("downloading Omniglot's %s split to %s", split, archive)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            download_url(f"{URL}/images_{split}.zip", folder, "draft.zip", MD5[split])
            content = Path(folder, "draft.zip").read_bytes()
    except (*DAMAGE, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise UserError(
            f"{archive} is missing and cannot be downloaded ({reason(error)}); connect to the "
            "network, put the zip there, or give with --dataset-path a root that has omniglot-py/"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    write_bytes(archive, content)
    return archive


def _scan(place: Path, archive: zipfile.ZipFile | None) -> Iterator[Drawing]:
    """All PNG files of a folder, or of the zip `archive` at `place`; hidden ones are left out.

    Any folders may lead to the alphabets: a zip may be packed anew, and "Extract All" of
    `images_background.zip` makes `images_background/images_background`.
    """
    if archive is None:
        status = [(path.relative_to(place).as_posix(), path.stat()) for path in place.rglob("*.png")]
        found = [(member, (now.st_size, now.st_mtime_ns)) for member, now in status]
    else:
        found = [(info.filename, (info.file_size, info.CRC)) for info in archive.infolist()]
    for member, stamp in found:
        parts = member.replace("\\", "/").split("/")  # some programs write backslashes
        if parts[-1].lower().endswith(".png") and not parts[-1].startswith("."):
            yield Drawing("/".join(parts[-3:]), member, stamp)


def _check(place: Path, drawings: list[Drawing], classes: int) -> tuple[str, ...]:
    """The names of the classes, sorted as the drawings are. Raises UserError for a wrong name or number."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for drawing in drawings:
        if not DRAWING_NAME.fullmatch(drawing.name):
            raise _fault(place, "not named ALPHABET/characterNN/NNNN_NN.png as in Omniglot", drawing.member)
        members[drawing.name.rpartition("/")[0]].append(drawing.member)
    for files in members.values():
        if len(files) != DRAWINGS:
            folder = files[0].rpartition("/")[0]
            raise _fault(place, f"{len(files)} drawings instead of {DRAWINGS}", folder)
    if len(members) != classes:
        alphabets = len({name.partition("/")[0] for name in members})
        raise _fault(
            place, f"{len(members)} characters in {alphabets} alphabets instead of {classes} characters"
        )
    return tuple(members)


def _decode(content: bytes) -> NDArray[np.uint8]:
    """Decode one PNG file to uint8 `[28, 28]`. Raises one of DAMAGE."""
    picture = open_picture(content, ("PNG",))
    if picture.size != (CANVAS, CANVAS):
        width, height = picture.size
        raise ValueError(f"{width} x {height} pixels instead of {CANVAS} x {CANVAS}")
    return shrink(picture)


def _fault(place: Path, what: str, member: str = "") -> UserError:
    where = f"{place}{'/' if place.is_dir() else ':'}{member}" if member else f"{place}"
    return UserError(f"{where}: {what}; restore it, or remove {place} to have Omniglot downloaded again")
