"""Files that are either whole or not there."""

from __future__ import annotations

import codecs
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from utils.errors import refusing


def expand(text: str) -> Path:
    """The path that a user's text names: a leading `~` or `~user` is a home folder.

    The shell does that for `~/x` but not for `--flag=~/x`, and nobody does it within a file. `./~` is
    not touched, nor is what names no user.
    """
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib takes ./~ for ~, and fails without a user)


def place_of(folder: Path) -> dict[str, str]:
    """Where a `folder` is, and `cwd`, which relative paths start from; empty where that was removed."""
    try:
        return {"folder": str(folder.resolve()), "cwd": str(Path.cwd())}
    except OSError:
        return {}


@contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path`, complete and on disk, when the block ends well.

    Until then, and after an exception, `path` holds what it held before.

    Args:
        previous: where what `path` held before is kept, in the same folder. A process that is killed
            between the two renames leaves it there and nothing under `path`.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    with refusing(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        draft = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            umask = os.umask(0)  # the only way to read it
            os.umask(umask)
            with suppress(OSError):  # network shares and mounts of Windows may have modes of their own
                draft.chmod(0o666 & ~umask)
            if previous is not None and path.exists():
                path.replace(previous)
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()


def sync(handle: int) -> None:
    """Put what was written to an open file on disk, where its file system can.

    Raises:
        OSError: it did not get there; the disk may be full.
    """
    try:
        os.fsync(handle)
    except OSError as error:  # of others, a file system says that it has no fsync
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def keep_earlier(path: Path) -> Path | None:
    """Keep what `path` holds as `name.1.suffix`, or the next free number, before it is replaced.

    Returns:
        where it is kept, perhaps since earlier; None if there is nothing to keep.

    Raises:
        UserError: a file cannot be read or written.
    """
    with refusing(f"read {path}"):
        if not path.exists():
            return None
        content = path.read_bytes()
        for number in count(1):
            kept = path.with_name(f"{path.stem}.{number}{path.suffix}")
            if not kept.exists():
                write_bytes(kept, content)
            if kept.read_bytes() == content:
                return kept
    raise AssertionError("count() does not end")


def remove_drafts(path: Path) -> None:
    """Remove what writers of `path` left that were killed in the middle of :func:`atomic_write`;
    its name may be a pattern."""
    for draft in path.parent.glob(f".{path.name}.*"):
        with suppress(OSError):
            draft.unlink()


def read_text(path: Path) -> str:
    """The text of a file that people may have edited: UTF-8, or UTF-16 with its mark, and any line ends.

    Editors and spreadsheets of Windows put a byte order mark in front, which is no part of the text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text.
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
    """Find out now whether `path`, which `flag` names, can be written later, at the end of a long run.

    Raises:
        UserError: its folder cannot be written, or it is a folder itself.
    """
    with refusing(f"write {flag} {path}"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.try.")
        os.close(handle)
        with suppress(OSError):
            Path(draft).unlink()
