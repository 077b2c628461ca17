"""Images that take seconds to decode or draw, kept in one file, so that the next start is quick."""

from __future__ import annotations

import hashlib
import io
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datasets.images import reason
from utils.errors import UserError
from utils.files import write_bytes

log = logging.getLogger("anml")

PART = 500  # images made at a time
SECONDS = 0.03  # for images made anew before a cache is used; four are made however long they take
Make = Callable[[Sequence[int]], NDArray[np.uint8]]


def cached(folder: Path, name: str, origin: bytes, count: int, make: Make) -> NDArray[np.uint8]:
    """The images `make(range(count))`, uint8 [count, ...], from `folder / NAME.npz` if it holds them.

    Before the file is used, up to 20 of its images from the first to the last are made anew. Where one of
    them differs, the code that prepares images has changed, and the file is built again. So is a file that
    is damaged or of another origin. One line of the log says why. A folder that cannot be written costs a
    warning, not the run.

    Args:
        name: of the data set; a folder keeps one file for each name.
        origin: what the images are made of, such as names, sizes and times of files.
        make: gives the images at some positions, uint8 [N, ...]. Its exceptions pass through.
    """
    path, key = folder / f"{name}.npz", hashlib.sha256(origin).hexdigest()
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            images, found = np.asarray(file["images"], np.uint8), str(file["key"])
        same, end = (found, len(images)) == (key, count), time.perf_counter() + SECONDS
        for number in range(20):  # the last image, those near a third and two thirds, the first, then others
            k = (19 + 7 * number) % 20 * (count - 1) // 19
            if same and (number < 4 or time.perf_counter() < end):
                same = np.array_equal(make([k]), images[k : k + 1])
        if same:
            return images
        raise ValueError("it is of other files or options, or the code that prepares images has changed")
    except (FileNotFoundError, NotADirectoryError):
        log.info("%s: preparing %d images, once", name, count)
    except Exception as error:  # NumPy and zipfile raise many kinds on damaged bytes
        log.warning("%s: the cache %s is built again: %s", name, path, reason(error))
    bar = tqdm(range(0, count, PART), name, leave=False, disable=not sys.stderr.isatty())
    images = np.concatenate([make(range(count)[start : start + PART]) for start in bar])
    content = io.BytesIO()
    np.savez(content, key=np.array(key), images=images)
    try:
        write_bytes(path, content.getvalue())
    except UserError as error:
        log.warning("%s; without this cache (--cache_dir) every start prepares the images again", error)
    return images
