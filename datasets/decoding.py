"""Picture files, read without trust: what is wrong with one is an error that says so."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib

from PIL import Image, UnidentifiedImageError

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
