"""Picture files, read without trust: what is wrong with one is an error that says so."""

from __future__ import annotations

import lzma
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

T = TypeVar("T")

# What zipfile and Pillow raise on damaged input, beside UserError's own causes.
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    SyntaxError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)


def reason(error: BaseException, kind: str = "") -> str:
    """Say what went wrong, without the addresses and paths in some libraries' messages."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a {kind} picture".replace("  ", " ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def progress(images: Iterable[T], total: int) -> Iterable[T]:
    """The same, with a bar on a terminal."""
    bar: Iterable[T] = tqdm(images, total=total, unit="image", disable=not sys.stderr.isatty(), leave=False)
    return bar
