"""Output of scripts, and errors of user, data or disk: one line on stderr, exit code 2.

No state of stdout or stderr ends a run: closed, a pipe without a reader, a full disk, an encoding without
umlauts.
"""

import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class UserError(Exception):
    """An error that the user can mend; the message is one line with cause and remedy."""


def reason(error: BaseException) -> str:
    """What an exception says went wrong, in one line and without the paths in messages of the system."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function, and end the process with the usual exit code.

    The exit code is 0 when `main` returns, 2 after a :class:`UserError` (printed as one line on stderr, as by
    argparse), and 130 after Ctrl-C. Any other exception is a defect and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (to the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        try_to_write(f"{Path(sys.argv[0]).name}: error: {line}\n", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):  # a write error at exit would change the exit code
            try_to_write("", stream)


@contextmanager
def refusing(what: str, hint: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a UserError: "cannot `what`: the reason", and `hint`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {what}: {reason(error)}{hint}") from error


def load_library(name: str) -> Any:
    """A module of a library that not all runs need.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library that is half there raises nearly anything
        library, why = name.partition(".")[0], reason(error)
        remedy = "unset what is wrong in its settings, or pip install -r requirements.txt"
        raise UserError(f"cannot import {library}: {why}; {remedy}") from error


def say(text: str) -> None:
    """Print a result, or raise UserError if stdout cannot be written (a reader that has left is no error)."""
    error = try_to_write(f"{text}\n", sys.stdout)
    with refusing("write to stdout"):
        if error is not None and not isinstance(error, BrokenPipeError):
            raise error


def try_to_write(text: str, stream: TextIO) -> OSError | None:
    """Write `text` and flush; returns the error if that fails, and sends the stream's later output to
    /dev/null."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return error
    return None
