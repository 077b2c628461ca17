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

from model.meta_test import PURPOSES, Score
from utils.errors import UserError
from utils.files import sync


class Key(NamedTuple):
    """What a score is a function of, within one run folder; `purpose` is one of `PURPOSES`."""

    purpose: str
    model: str
    classes: int
    draw: int
    lr: float


COLUMNS = (*Key._fields, *Score._fields)


class Journal:
    """The file of scores of a run folder; a context manager.

    One line is appended per score and put on disk before the next score begins. Rewriting a whole
    file each time would be as safe, but would cost more with every score, of which a search makes
    thousands. A process killed at any moment, or a full disk, can at worst tear the last line: it
    lacks its end, is cut off when the file is next opened, and its score is computed again. Numbers
    are written with all their digits.

    Attributes:
        known: scores by key.

    Raises:
        UserError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            self.known = self._parse(content[:whole])
            self._file = path.open("ab", buffering=0)
            self._file.truncate(whole)
            if not whole:
                self._append(COLUMNS)
        except OSError as error:
            raise self._unwritable(error) from error

    def _parse(self, content: bytes) -> dict[Key, Score]:
        try:
            rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
        except (ValueError, csv.Error) as error:
            raise UserError(f"{self.path} is damaged: {error}") from error
        if rows and tuple(rows[0]) != COLUMNS:
            raise UserError(f"{self.path} has the columns {','.join(rows[0])}, not {','.join(COLUMNS)}")
        known = {}
        for number, row in enumerate(rows[1:], 2):
            try:
                purpose, model, classes, draw, lr, test, train, above_chance = row
                PURPOSES.index(purpose)
                key = Key(purpose, model, int(classes), int(draw), float(lr))
                known[key] = Score(float(test), float(train), int(above_chance))
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: no score: {','.join(row)}") from error
        return known

    def score(self, key: Key, compute: Callable[[], Score]) -> Score:
        """The score under `key`, computed and written if it is not known.

        Raises:
            UserError: it cannot be written.
        """
        if key not in self.known:
            score = compute()
            try:
                self._append((*key, *score))
            except OSError as error:
                raise self._unwritable(error) from error
            self.known[key] = score
        return self.known[key]

    def _append(self, values: Sequence[object]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        data = line.getvalue().encode()
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
