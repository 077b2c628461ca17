"""Scores of an evaluation on disk as soon as they are known, so that none is computed twice."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from model.meta_test import PURPOSES
from model.scores import MEASURES, Score
from utils.errors import UserError
from utils.files import remove_drafts, sync, write_text


class Key(NamedTuple):
    """What a score is a function of, within one run folder; `purpose` is one of `PURPOSES`, and `lr` None
    where the learner takes no steps."""

    purpose: str
    model: str
    classes: int
    draw: int
    lr: float | None


def columns() -> list[str]:
    """The columns of a journal as it is written today."""
    return [*Key._fields, *MEASURES]


class Journal:
    """The file of scores of a run folder; a context manager.

    One line is appended per score and put on disk before the next score begins. Rewriting a whole
    file each time would be as safe, but would cost more with every score, of which a search makes
    thousands. A process killed at any moment, or a full disk, can at worst tear the last line: it
    lacks its end, is cut off when the file is next opened, and its score is computed again. Numbers
    are written with all their digits. A file whose header is not today's is written anew, whole or not
    at all: measures that it lacks are missing in its scores.

    Attributes:
        known: scores by key.

    Raises:
        UserError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes() if path.exists() else b""
            remove_drafts(path)
            whole = content.rfind(b"\n") + 1
            header, self.known = self._parse(content[:whole])
            if header not in ([], columns()):
                lines = [_line(columns()), *(_line(_cells(*item)) for item in self.known.items())]
                write_text(path, "".join(lines))
                whole = path.stat().st_size
            self._file = path.open("ab", buffering=0)
            self._file.truncate(whole)
            if not whole:
                self._append(columns())
        except OSError as error:
            raise self._unwritable(error) from error

    def _parse(self, content: bytes) -> tuple[list[str], dict[Key, Score]]:
        """Header and scores; both are empty for an empty file."""
        try:
            rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
        except (ValueError, csv.Error) as error:
            raise UserError(f"{self.path} is damaged: {error}") from error
        header, *rows = rows or [[]]
        names = set(header)
        if header and not (set(Key._fields) < names <= set(columns()) and len(names) == len(header)):
            raise UserError(f"{self.path} has the columns {','.join(header)}, not {','.join(columns())}")
        known = {}
        for number, row in enumerate(rows, 2):
            try:
                cells = dict(zip(header, row, strict=True))
                purpose, model, classes, draw, lr = (cells[name] for name in Key._fields)
                PURPOSES.index(purpose)
                key = Key(purpose, model, int(classes), int(draw), float(lr) if lr else None)
                known[key] = Score.read(cells, key.classes)
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: no score: {','.join(row)}") from error
        return header, known

    def score(self, key: Key, compute: Callable[[], Score]) -> Score:
        """The score under `key`, computed and written if it is not known.

        Raises:
            UserError: it cannot be written.
        """
        if key not in self.known:
            score = compute()
            try:
                self._append(_cells(key, score))
            except OSError as error:
                raise self._unwritable(error) from error
            self.known[key] = score
        return self.known[key]

    def _append(self, values: Sequence[object]) -> None:
        data = _line(values).encode()
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(self._file.fileno())

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror or error}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _cells(key: Key, score: Score) -> list[object]:
    """A row of today's columns; a missing value is an empty cell."""
    return [*key, *(score.get(name) for name in MEASURES)]


def _line(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
