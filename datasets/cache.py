"""Images that took seconds to decode or draw, kept in one file: the next start is quick."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from utils.files import atomic_write

log = logging.getLogger("anml")

KEPT = 4  # files of a name: a few folders, seeds or states of the same data
DIGEST_BYTES = hashlib.sha256().digest_size


def cached(
    folder: Path,
    name: str,
    key: str,
    shape: tuple[int | None, ...],
    build: Callable[[], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Read a uint8 array of `shape` from `folder`, or build it and leave it there.

    The file is an `.npy` array followed by a sha256 digest of key and array. A damaged file, or one
    written for another key, is replaced with a warning. A folder that cannot be written costs a
    warning, not the run. Of the files of a name those last used stay.

    Args:
        folder: made if it does not exist.
        name: start of the file's name, for people.
        key: hex digest of everything that the array depends on.
        shape: of the array that belongs to `key`; None for what is not known before.
        build: makes the array. Its exceptions pass through, and nothing is written then.
    """
    path = folder / f"{name}-{key[:16]}.npy"
    array = _read(path, key, shape)
    if array is None:
        array = build()
        body = io.BytesIO()
        np.save(body, array, allow_pickle=False)
        try:
            with atomic_write(path) as file:
                file.write(body.getbuffer())
                file.write(_digest(key, body.getbuffer()))
        except UserError as error:
            log.warning("%s; without this cache (--cache_dir) every start prepares the images again", error)
    _remove_unused(path, name)
    return array


def _remove_unused(path: Path, name: str) -> None:
    """Note that `path` is in use, and remove all but the `KEPT` files of its name that were used last."""
    with suppress(OSError):  # it may be somebody else's folder, to be read alone
        os.utime(path)
        others = [other for other in path.parent.glob(f"{glob.escape(name)}-*.npy") if _is_key(other, name)]
        for other in sorted(others, key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
            other.unlink()


def _is_key(path: Path, name: str) -> bool:
    return re.fullmatch("[0-9a-f]{16}", path.stem.removeprefix(f"{name}-")) is not None


def _digest(key: str, body: bytes | memoryview) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + body).digest()


def _read(path: Path, key: str, shape: tuple[int | None, ...]) -> NDArray[np.uint8] | None:
    """Return the array in `path`, or None where it is absent, damaged or not what `key` names."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("cannot read the cache %s (%s); building it again", path, error.strerror)
        return None
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    # The digest comes first: NumPy's parser sees nothing but what this module wrote.
    if digest == _digest(key, body):
        array = np.load(io.BytesIO(body), allow_pickle=False)
        fits = len(array.shape) == len(shape) and all(map(_agrees, array.shape, shape))
        if fits and array.dtype == np.uint8:
            return np.asarray(array, dtype=np.uint8)
    log.warning("the cache %s is damaged or belongs to other data; building it again", path)
    return None


def _agrees(size: int, expected: int | None) -> bool:
    return expected in (None, size)
