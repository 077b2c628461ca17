"""Files that are either whole or not there."""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from utils.errors import refusing


@contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path`, complete and on disk, when the block ends well.

    Until then, and after an exception, `path` has its earlier content.

    Args:
        previous: a path in the same folder that gets the earlier content of `path`. A process that is killed
            between the two renames leaves that content under `previous`, and nothing under `path`.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    with refusing(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with draft.open("xb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()


def sync(handle: int) -> None:
    """Write an open file's content through to the disk, where the file system can do that.

    Raises:
        OSError: the content is not on the disk, which may be full.
    """
    try:
        os.fsync(handle)
    except OSError as error:  # any other error means that the file system has no fsync
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def keep_earlier(path: Path) -> Path | None:
    """Copy the file `path`, which is to be replaced, to `name.1.suffix` or the next free number.

    Returns:
        the copy's path; an equal copy that exists is enough. None if there is no file.

    Raises:
        UserError: a file cannot be read or written.
    """
    with refusing(f"read {path}"):
        if not path.exists():
            return None
        content = path.read_bytes()
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        kept = next(name for name in names if not name.exists() or name.read_bytes() == content)
        if not kept.exists():
            write_bytes(kept, content)
        return kept


def read_text(path: Path) -> str:
    """The text of a file that people may have edited: UTF-8, or UTF-16 with its mark, and any line ends.

    Editors and spreadsheets of Windows put a byte order mark in front of the text.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not text.
    """
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically; see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically; see :func:`atomic_write`."""
    write_bytes(path, text.encode())


def check_writable(path: Path, flag: str) -> None:
    """Raise UserError now if `path`, which `flag` names, cannot be written at the end of a long run."""
    with refusing(f"write {flag} {path}"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
