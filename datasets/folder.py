"""A folder of pictures: `ROOT/background/CLASS/*` and `ROOT/evaluation/CLASS/*`, or `ROOT/CLASS/*`.

As in `torchvision.datasets.ImageFolder` a folder is a class. Here, folders may lie in folders, as Omniglot's
characters in alphabets: each that holds pictures itself is a class, named by its path.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datasets.cache import cached
from datasets.decoding import DAMAGE, progress, reason
from datasets.images import SIZE, ImageSet, shrink
from utils.errors import UserError
from utils.signature import Range

log = logging.getLogger("anml")

VERSION = "1: upright, on white, 28x28 LANCZOS"
"""Part of the cache's key: change it with whatever happens to a picture on its way to the cache."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # of Pillow's, some of which start other programs
LITTER = ("thumbs.db", "desktop.ini", "icon\r", "__macosx")  # of systems, beside what begins with a dot
OTHER_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SPLITS = ("background", "evaluation")
THREADS = 2  # Pillow lets others work while it decodes, which pays for files that are
LARGE = 2**15  # bytes in the mean
SHOWN = 3  # files or folders named in a message


class Picture(NamedTuple):
    """One file. `label` is the path of its folder, `/` between the parts."""

    label: tuple[str, ...]
    name: str
    path: str
    stamp: tuple[int, ...]  # changes with the content: size and times (ns)


def load(
    split: str,
    root: Path,
    cache_dir: Path,
    *,
    channels: Annotated[
        int | None,
        "1 to have all pictures grey, 3 to have them in colour; else as the files are",
        Range(1, 3),
    ] = None,
    evaluation_classes: Annotated[
        int | None,
        "classes kept for meta-test, drawn by --data_seed, of a folder without splits of its own",
        Range(2),
    ] = None,
    data_seed: Annotated[int, "seed of that draw", Range(0, 2**32 - 1)] = 0,
) -> ImageSet:
    """A folder of pictures in class folders, in `background/` and `evaluation/` or drawn apart.

    Pictures become 28 x 28, whatever their shape. They are turned upright (EXIF) and put on white where they
    are transparent; of 16 bits the upper 8 count, and of an animation the first picture. All are grey, or
    all have three channels where one shows a colour. Links are followed; hidden files and the litter of
    systems do not count, and of other files there is a notice.

    Returns:
        Classes sorted by path, images by file name.

    Raises:
        UserError: no or too few classes, a picture that cannot be read, a class in both splits.
    """
    if channels == 2:
        raise UserError("--channels 2: choose 1 or 3")
    pictures = _scan(root)
    splits = _splits(
        root, dict.fromkeys(picture.label for picture in pictures), evaluation_classes, data_seed
    )
    outside = [
        picture for picture in pictures if not any(picture.label in names for names in splits.values())
    ]
    if outside:
        log.warning(
            "%s: %d pictures do not count, being in no class folder of background/ or evaluation/: %s",
            *(root, len(outside), _some([os.path.relpath(picture.path, root) for picture in outside])),
        )
        pictures = [
            picture for picture in pictures if any(picture.label in names for names in splits.values())
        ]
    key = hashlib.sha256(f"{VERSION}\n{channels}\n".encode())
    for picture in pictures:
        key.update(repr((picture.label, picture.name, picture.stamp)).encode())
    pixels = cached(
        cache_dir,
        re.sub(r"[^\w.]", "_", root.resolve().name) or "folder",
        key.hexdigest(),
        (len(pictures), None, SIZE, SIZE),
        lambda: _decode_all(root, pictures, channels),
    )
    _report_leaks(root, pictures, pixels, splits)
    if not splits[split]:
        raise UserError(f"{root} has no pictures in {split}/")
    classes: defaultdict[str, list[int]] = defaultdict(list)
    for position, picture in enumerate(pictures):
        if picture.label in splits[split]:
            classes[splits[split][picture.label]].append(position)
    if len(classes) < 2:
        raise UserError(
            f"{root}: one class in {split}, {next(iter(classes))}; to tell classes apart takes two"
        )
    images = torch.from_numpy(pixels[np.concatenate(list(classes.values()))])
    sizes = tuple(map(len, classes.values()))
    notes = {"evaluation_classes": list(splits["evaluation"].values())} if evaluation_classes else {}
    name = f"folder {root.resolve().name} {split}"
    return ImageSet.hashed(name, images, sizes, tuple(classes), notes=notes)


def _scan(root: Path) -> list[Picture]:
    """All pictures in folders below `root`, sorted by path; of other files there is a notice."""
    pictures: list[Picture] = []
    others: list[str] = []

    def walk(folder: Path, label: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
        status = folder.stat()
        here = status.st_dev, status.st_ino
        if here in above:  # a link to a folder that it lies in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in LITTER:
                    continue
                if entry.is_dir():
                    walk(folder / entry.name, (*label, _readable(entry.name)), (*above, here))
                    continue
                if label and entry.name.lower().endswith(SUFFIXES):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):  # no device or pipe, which reading might wait for
                        stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns
                        pictures.append(Picture(label, _readable(entry.name), entry.path, stamp))
                        continue
                others.append(os.path.relpath(entry.path, root))

    try:
        walk(root, (), ())
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
    if others:
        log.warning(
            "%s: %d files do not count, since they are no pictures or in no class folder: %s",
            *(root, len(others), _some(others)),
        )
    if not pictures:
        raise UserError(
            f"{root} holds no pictures ({', '.join(SUFFIXES)}) in class folders: it takes "
            "background/CLASS/ and evaluation/CLASS/, or CLASS/ with --evaluation_classes"
        )
    return sorted(pictures, key=lambda picture: (picture.label, picture.name))


def _readable(name: str) -> str:
    """A file's name as text that can be written and is the same on all systems."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode(errors="backslashreplace"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + ", ..." * (len(names) > SHOWN)


Labels = dict[tuple[str, ...], str]
"""Names of classes by the paths of their folders, sorted by these."""


def _splits(
    root: Path, labels: dict[tuple[str, ...], None], evaluation_classes: int | None, seed: int
) -> dict[str, Labels]:
    """The classes of `background` and `evaluation`, of folders of these names or drawn."""
    inside = {
        split: {label: "/".join(label[1:]) for label in labels if len(label) > 1 and label[0] == split}
        for split in SPLITS
    }
    if any(inside.values()):
        if evaluation_classes is not None:
            raise UserError(f"{root} has background/ and evaluation/: drop --evaluation_classes")
        both = sorted(set(inside["background"].values()) & set(inside["evaluation"].values()))
        if both:
            raise UserError(f"{root}: the same class is in background/ and evaluation/: {_some(both)}")
        return inside
    tops = {label[0] for label in labels}
    if tops <= {*OTHER_SPLITS, *SPLITS}:
        raise UserError(
            f"{root} holds {_some([f'{top}/' for top in tops])}: splits are called background/ and "
            "evaluation/ here, share no class and hold a folder for each"
        )
    if evaluation_classes is None:
        raise UserError(
            f"{root} has no background/ and evaluation/: give --evaluation_classes N, how many of its "
            f"{len(labels)} classes are kept for meta-test"
        )
    if len(labels) - evaluation_classes < 2:
        raise UserError(
            f"--evaluation_classes {evaluation_classes} leaves fewer than two of {root}'s {len(labels)} "
            "classes to train on"
        )
    names = {label: "/".join(label) for label in labels}

    # By a hash, so that the draw is the same everywhere, and no class that was trained on is drawn when
    # others join it.
    def rank(label: tuple[str, ...]) -> bytes:
        return hashlib.sha256(f"{seed} {names[label]}".encode()).digest()

    drawn = set(sorted(labels, key=rank)[:evaluation_classes])
    return {
        "background": {label: name for label, name in names.items() if label not in drawn},
        "evaluation": {label: name for label, name in names.items() if label in drawn},
    }


def _report_leaks(
    root: Path, pictures: Sequence[Picture], pixels: NDArray[np.uint8], splits: dict[str, Labels]
) -> None:
    """Name files of one split that are byte for byte files of the other."""
    hashes = [hash(image.tobytes()) for image in pixels]  # equal files have equal pixels
    sides = [[k for k, picture in enumerate(pictures) if picture.label in splits[split]] for split in SPLITS]
    alike = set.intersection(*({hashes[k] for k in side} for side in sides))
    if not alike:
        return
    background, evaluation = (
        {hashlib.sha256(_content(pictures[k])).digest(): pictures[k] for k in side if hashes[k] in alike}
        for side in sides
    )
    leaks = [
        " is ".join(os.path.relpath(side[digest].path, root) for side in (evaluation, background))
        for digest in background.keys() & evaluation.keys()
    ]
    if leaks:
        log.warning(
            "%s: a leak, %d files of meta-test classes are byte for byte files of meta-training classes: %s",
            *(root, len(leaks), _some(leaks)),
        )


def _decode_all(root: Path, pictures: Sequence[Picture], channels: int | None) -> NDArray[np.uint8]:
    """Decode pictures to uint8 [N, C, 28, 28]."""
    log.info("reading %d pictures of %s, once", len(pictures), root)
    images = np.empty((len(pictures), channels or 1, SIZE, SIZE), np.uint8)
    animations = []

    def read(picture: Picture) -> tuple[NDArray[np.uint8], bool]:
        try:
            return _decode(_content(picture), channels)
        except DAMAGE as error:
            raise UserError(f"{picture.path}: {reason(error)}; restore the file or remove it") from error

    large = sum(picture.stamp[0] for picture in pictures) > LARGE * len(pictures)
    with ThreadPool(THREADS if large else 1) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and of odd metadata
        decoded = pool.imap(read, pictures, 32) if large else map(read, pictures)
        for k, (image, animated) in enumerate(progress(decoded, len(pictures))):
            if len(image) > images.shape[1]:  # the first colour among grey ones
                images = np.repeat(images, len(image), 1)
            images[k] = image
            if animated:
                animations.append(os.path.relpath(pictures[k].path, root))
    if animations:
        log.warning(
            "%s: of %d files with several pictures the first counts: %s",
            *(root, len(animations), _some(animations)),
        )
    return images


def _content(picture: Picture) -> bytes:
    try:
        return Path(picture.path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {picture.path}: {error.strerror or error}") from error


def _decode(content: bytes, channels: int | None) -> tuple[NDArray[np.uint8], bool]:
    """Decode a file to uint8 [C, 28, 28], C as asked for or as it shows a colour; and if it is an animation.

    Raises one of DAMAGE.
    """
    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    if picture.format == "PNG":
        picture.verify()  # decoding alone ignores checksums, and this uses the picture up
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    animated = picture.format not in ("JPEG", "MPO") and getattr(picture, "is_animated", False)
    picture.load()
    if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    if picture.info or picture.format != "PNG":
        with suppress(*DAMAGE):  # a picture with damaged metadata is a picture
            ImageOps.exif_transpose(picture, in_place=True)
    flat: Image.Image = picture
    if picture.mode.startswith("I"):
        flat = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    if channels != 3 and flat.mode in ("1", "L"):
        return shrink(flat)[None], animated
    if channels == 1:
        return shrink(flat.convert("L"))[None], animated
    colours = shrink(flat.convert("RGB"))
    grey = channels is None and bool((colours == colours[:1]).all())
    return colours[:1] if grey else colours, animated
