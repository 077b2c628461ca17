"""How a script ends when the user, the data or the disk is at fault: one line on stderr, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """What is wrong and what to do about it, in one line for the person at the terminal."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function and leave the process with the exit code users expect.

    0 when `main` returns, 2 after a :class:`UserError` (printed as one line on stderr, as argparse
    does for a wrong flag) and 130 after Ctrl-C. Any other exception is a defect and keeps its
    traceback.
    """
    try:
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
