"""Omniglot (Lake et al. 2015) from `ROOT/omniglot-py/` and the like: extracted folders, zips, or a download.

All names, counts and pictures are checked before they are used. A message names the file that is wrong.
"""

import contextlib
import io
import logging
import os
import re
import socket
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.folder import DAMAGE, Picture, prepared, stamp_of
from datasets.images import OMNIGLOT, SIZE, ImageSet
from utils.errors import UserError, load_library, reason
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
# Where else under a root the splits may be: in the authors' repository, and in folders that unpacking adds.
DEEPER = ("python", "omniglot*", "omniglot*/python", "omniglot*/omniglot*", "omniglot*/omniglot*/python")


def load(split: str, root: Path, cache_dir: Path, size: int = SIZE) -> ImageSet:
    """Omniglot, which is downloaded where it is missing.

    Args:
        split: `background` or `evaluation`; nothing of the other split is touched.
        root: as `torchvision.datasets.Omniglot` takes it, or the folder of the split's zip or folder.
        cache_dir: see :func:`datasets.images.cached`.
        size: side of the images, in pixels.

    Returns:
        20 grey images of each class, sorted by alphabet, character and file name.

    Raises:
        UserError: the data is missing and cannot be downloaded, or incomplete, or damaged.
    """
    place = _find(split, root)
    try:
        with contextlib.nullcontext() if place.is_dir() else zipfile.ZipFile(place) as archive:
            drawings = sorted(_scan(place, archive), key=lambda drawing: (drawing.label, drawing.name))
            classes = _check(place, drawings, CLASSES[split])
            images = prepared(cache_dir, f"omniglot-{split}", drawings, 1, size, CANVAS)
    except DAMAGE as error:
        raise _fault(place, place, reason(error)) from error
    return characters(f"omniglot {split}", split, images, classes)


def characters(name: str, split: str, images: NDArray[np.uint8], classes: tuple[str, ...]) -> ImageSet:
    """The set of `images`, `[20 * C, 1, S, S]`, normalised and used as Omniglot's `split` is by default."""
    sizes = (DRAWINGS,) * len(classes)
    return ImageSet(name, torch.from_numpy(images), sizes, classes, OMNIGLOT, DEFAULT_CLASSES[split])


def _find(split: str, root: Path) -> Path:
    """The split's folder or zip under `root`, which is downloaded where neither is there.

    `root` may hold `omniglot-py/`, as in torchvision, or be that folder, or a split's folder or zip in
    it; or hold or be the authors' repository.
    """
    while root.absolute().stem in [f"images_{split}" for split in CLASSES]:
        root = root.absolute().parent
    home = root if root.absolute().name == "omniglot-py" else root / "omniglot-py"
    for place in (home, root, *(place for pattern in DEEPER for place in sorted(root.glob(pattern)))):
        for found in (place / f"images_{split}", place / f"images_{split}.zip"):
            if os.path.lexists(found):
                return found
    return _download(split, home / f"images_{split}.zip")


def _download(split: str, archive: Path) -> Path:
    """Download a split's official zip to `archive`, which appears whole or not at all; returns `archive`."""
    log.info("downloading Omniglot's %s split to %s", split, archive)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        # A second to import, which other starts save.
        download_url = load_library("torchvision.datasets.utils").download_url
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            download_url(f"{URL}/{archive.name}", folder, archive.name, MD5[split])
            content = Path(folder, archive.name).read_bytes()
    except (*DAMAGE, HTTPException, UserError) as error:
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


def _scan(place: Path, archive: zipfile.ZipFile | None) -> Iterator[Picture]:
    """All PNG files of a folder, or of the zip `archive` at `place`; hidden ones are left out.

    Any folders may lead to the alphabets: a zip may be packed anew, and "Extract All" of
    `images_background.zip` makes `images_background/images_background`.
    """
    if archive is None:
        found: Iterable[Any] = ((path.as_posix(), path, stamp_of(path)) for path in place.rglob("*.png"))
    else:
        members = ((info, zipfile.Path(archive, info.filename)) for info in archive.infolist())
        found = ((info.filename, path, (info.file_size, info.CRC)) for info, path in members)
    for member, path, stamp in found:
        *folders, name = member.replace("\\", "/").split("/")  # some programs write backslashes
        if name.lower().endswith(".png") and not name.startswith("."):
            yield Picture(tuple(folders[-2:]), name, path, stamp)


def _check(place: Path, drawings: Sequence[Picture], classes: int) -> tuple[str, ...]:
    """The names of the classes, sorted as the drawings are. Raises UserError for a wrong name or number."""
    members = defaultdict(list)
    for drawing in drawings:
        character = "/".join(drawing.label)
        if not DRAWING_NAME.fullmatch(f"{character}/{drawing.name}"):
            raise _fault(place, drawing.path, "not named ALPHABET/characterNN/NNNN_NN.png as in Omniglot")
        members[character].append(drawing.path)
    for files in members.values():
        if len(files) != DRAWINGS:
            raise _fault(place, files[0].parent, f"{len(files)} drawings instead of {DRAWINGS}")
    if len(members) != classes:
        alphabets = len({drawing.label[0] for drawing in drawings})
        found = f"{len(members)} characters in {alphabets} alphabets"
        raise _fault(place, place, f"{found} instead of {classes} characters")
    return tuple(members)


def _fault(place: Path, file: object, what: str) -> UserError:
    where = str(file).rstrip("/")  # folders in a zip end so
    return UserError(f"{where}: {what}; restore it, or remove {place} to have Omniglot downloaded again")
