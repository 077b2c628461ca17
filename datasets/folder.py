"""A folder of pictures: `ROOT/background/CLASS/*` and `ROOT/evaluation/CLASS/*`, or `ROOT/CLASS/*`.

As in `torchvision.datasets.ImageFolder` a folder is a class. Here, folders may lie in folders, as Omniglot's
characters in alphabets: each folder that holds pictures is a class, named by its path.
"""

import hashlib
import io
import logging
import os
import re
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from datasets.images import SIZE, SPLITS, ImageSet, cached, shrink
from utils.errors import UserError, reason
from utils.flag import Range

log = logging.getLogger("anml")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # other formats make Pillow start other programs
OTHER_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SHOWN = 3  # files or folders named in a message

DAMAGE = (
    *(OSError, EOFError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)
"""What zipfile and Pillow raise on damaged files."""

Label = tuple[str, ...]  # the path of a class folder below the root


class Picture(NamedTuple):
    """A file, a `Path` or a `zipfile.Path`. Its stamp changes with its content."""

    label: Label
    name: str
    path: Any
    stamp: tuple[int, ...]


def load(
    split: str,
    root: Path,
    cache_dir: Path,
    size: int = SIZE,
    *,
    channels: Annotated[
        int | None,
        "1 to have all pictures grey, 3 to have them in colour; else as the files are",
        (1, 3),
    ] = None,
    evaluation_classes: Annotated[
        int | None,
        "classes kept for meta-test, drawn by --data_seed, of a folder without splits of its own",
        Range(2),
    ] = None,
    data_seed: Annotated[int, "seed of that draw", Range(0, 2**32 - 1)] = 0,
) -> dict[str, ImageSet]:
    """A folder of pictures in class folders, in `background/` and `evaluation/` or drawn apart.

    Pictures become S x S, whatever their shape. They are turned upright (EXIF) and put on white where they
    are transparent; of 16 bits the upper 8 count, and of an animation the first picture. All are grey, or
    all have three channels where one shows a colour. Links are followed. Hidden files do not count; of
    other files that do not, there is a notice.

    Returns:
        Both splits, as one start reads the files of both; without the other split where that has fewer than
        two classes. Classes are sorted by path, images by file name.

    Raises:
        UserError: no or too few classes, a picture that cannot be read, a class in both splits.
    """
    found, others = _scan(root)
    placed = _split_classes(root, sorted({picture.label for picture in found}), evaluation_classes, data_seed)
    pictures = [picture for picture in found if picture.label in placed]
    others += [picture.path.relative_to(root) for picture in found if picture.label not in placed]
    if others:
        log.warning("%s: %d files are no picture of a class: %s", root, len(others), some(others))

    home = root.resolve()
    name = re.sub(r"[^\w.]", "_", home.name) + "-" + hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    pixels = prepared(cache_dir, name, pictures, channels, size)
    if channels is None and (pixels == pixels[:, :1]).all():
        pixels = pixels[:, :1]
    drawn = [name for where, name in placed.values() if where == "evaluation"]
    notes = {"evaluation_classes": drawn} if evaluation_classes else {}
    sets, files = {}, {}
    for side in SPLITS:
        rows = [row for row, picture in enumerate(pictures) if placed[picture.label][0] == side]
        # Pictures of one split whose pixels are those of a picture of the other are found by their hashes.
        files[side] = {hash(pixels[row].tobytes()): pictures[row].path.relative_to(root) for row in rows}
        sizes = Counter(placed[pictures[row].label][1] for row in rows)
        if len(sizes) > 1:
            images = torch.from_numpy(pixels[rows])
            shown = f"folder {home.name} {side}"
            sets[side] = ImageSet(shown, images, tuple(sizes.values()), tuple(sizes), notes=notes)
        elif side == split:
            kept = f" with --evaluation_classes {evaluation_classes}" if evaluation_classes else ""
            raise UserError(f"{root}: {len(sizes)} classes in {split}{kept}; to tell classes apart takes two")
    background, evaluation = (files[side] for side in SPLITS)
    if same := background.keys() & evaluation.keys():
        leaks = [f"{evaluation[key].as_posix()} is {background[key].as_posix()}" for key in same]
        log.warning(
            "%s: a leak, %d pictures of meta-test classes are pictures of meta-training classes: %s",
            *(root, len(leaks), some(leaks)),
        )
    return sets


def _scan(root: Path) -> tuple[list[Picture], list[Path]]:
    """All pictures in folders below `root`, sorted by path, and all other files."""
    pictures: list[Picture] = []
    others: list[Path] = []

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folder = Path(place)
        # A link to a folder that it lies in, maybe by other links, would be followed without end.
        above = {outer.resolve() for outer in (folder, *folder.parents)} | {*folder.resolve().parents}
        inner = [name for name in folders if (folder / name).resolve() not in above]
        folders[:] = [name for name in inner if name[0] != "."]
        label = tuple(map(readable, folder.relative_to(root).parts))
        for path in (folder / name for name in files if name[0] != "."):
            # Reading a device or a pipe might wait without end.
            if label and path.suffix.lower() in SUFFIXES and path.is_file():
                pictures.append(Picture(label, readable(path.name), path, stamp_of(path)))
            else:
                others.append(path.relative_to(root))
    if not pictures:
        raise UserError(
            f"{root} holds no pictures ({', '.join(SUFFIXES)}) in class folders: it takes "
            "background/CLASS/ and evaluation/CLASS/, or CLASS/ with --evaluation_classes"
        )
    return sorted(pictures, key=lambda picture: (picture.label, picture.name)), others


def readable(name: str) -> str:
    """A file's name as text that can be written and is the same on all systems."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode(errors="backslashreplace"))


def some(names: Iterable[object]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _split_classes(
    root: Path, labels: Sequence[Label], evaluation_classes: int | None, seed: int
) -> dict[Label, tuple[str, str]]:
    """The split and the name of each class, by folders called `background` and `evaluation` or by a draw."""
    if seed and evaluation_classes is None:
        raise UserError(f"--data_seed {seed} means nothing without --evaluation_classes, whose draw it is of")
    inside = {label: (label[0], "/".join(label[1:])) for label in labels if label[0] in SPLITS and label[1:]}
    if inside:
        if evaluation_classes is not None:
            raise UserError(f"{root} has background/ and evaluation/: drop --evaluation_classes")
        names = [{name for where, name in inside.values() if where == split} for split in SPLITS]
        if both := set.intersection(*names):
            raise UserError(f"{root}: the same class is in background/ and evaluation/: {some(both)}")
        return inside
    tops = {label[0] for label in labels}
    if evaluation_classes is None or tops <= {*OTHER_SPLITS, *SPLITS}:
        raise UserError(
            f"{root} holds {some(f'{top}/' for top in tops)}: splits are called background/ and evaluation/ "
            "here; of classes without splits, give --evaluation_classes N, how many of its "
            f"{len(labels)} classes are kept for meta-test"
        )
    if evaluation_classes > len(labels):
        raise UserError(f"--evaluation_classes {evaluation_classes}: {root} has {len(labels)} classes")
    joined = {label: "/".join(label) for label in labels}
    drawn = set(ranked(joined.values(), seed)[:evaluation_classes])
    return {label: ("evaluation" if name in drawn else "background", name) for label, name in joined.items()}


def ranked(names: Iterable[str], seed: int) -> list[str]:
    """Names in a random order, the same everywhere, of which names that join later change nothing."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


def stamp_of(path: Path) -> tuple[int, ...]:
    """Size and times (ns) of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def prepared(
    cache_dir: Path,
    name: str,
    pictures: Sequence[Picture],
    channels: int | None,
    size: int,
    side: int | None = None,
) -> NDArray[np.uint8]:
    """Pictures as uint8 [N, 1, S, S] where `channels` is 1, else as [N, 3, S, S], made or from a cache.

    Args:
        size: side of the images, in pixels. One line of the log names a picture that is enlarged to it.
        side: width and height that all pictures have; None for any.

    Raises:
        UserError: a file is no picture, is damaged or has too many bits or another size.
    """

    def decoded(path: Any) -> NDArray[np.uint8]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of large pictures and of odd metadata
                picture = _flat(path.read_bytes()).convert("L" if channels == 1 else "RGB")
            if side and picture.size != (side, side):
                raise ValueError(f"{picture.width} x {picture.height} pixels instead of {side} x {side}")
            if min(picture.size) < size and not small:
                small.append(f"{path}, {picture.width} x {picture.height}")
            return shrink(picture, size).reshape(-1, size, size)
        except DAMAGE as error:
            raise UserError(f"{path}: {reason(error)}; restore it or remove it") from error

    def make(positions: Sequence[int]) -> NDArray[np.uint8]:
        return np.stack([decoded(pictures[position].path) for position in positions])

    origin = repr((channels, [(p.label, p.name, p.stamp) for p in pictures])).encode()
    small: list[str] = []
    pixels = cached(cache_dir, name, origin, len(pictures), make, size)
    for found in small:
        log.warning("pictures smaller than %d x %d are enlarged, among them %s", size, size, found)
    return pixels


def _flat(content: bytes) -> Image.Image:
    """The picture in a file, upright and on white. Raises one of DAMAGE."""
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # its message is an address
        raise ValueError("not a picture") from None
    if picture.format == "PNG":
        picture.verify()  # decoding alone ignores checksums, and verifying uses the picture up
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    picture.load()
    if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    with suppress(*DAMAGE):  # a picture with damaged metadata is a picture
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        transparent = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent)
    return picture
