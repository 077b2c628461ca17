"""Kill a training run at random moments and resume it, until it was killed often enough; then let it end.

    python -m tests.kill KILLS SEED FLAGS...

Runs are forked from one process that has imported everything: importing takes longer than they do.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mrcl_classification
from utils.errors import run_script

ROWS = 8  # new rows of metrics.csv before a kill, at most
LATE = 0.03  # seconds after them, at most: longer than a step, and than saving one


def start(flags: list[str], main: Callable[[], None] = mrcl_classification.main, **environment: str) -> int:
    """Fork a process that runs a script with `flags`, by default the training; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ.update(environment)
            sys.argv = ["script.py", *flags]
            run_script(main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def latest() -> Path | None:
    """The run folder that can be resumed, if there is one yet."""
    configs = sorted(Path("runs").glob("*/config.json"))
    return configs[-1].parent if configs else None


def resumed(flags: list[str]) -> list[str]:
    """`flags`, and `--resume` as soon as there is a run to resume."""
    run = latest()
    return flags if run is None else [*flags, "--resume", str(run)]


def wait_for_rows(number: int) -> None:
    """Return when that many rows were added to `metrics.csv`; whether a row is whole does not matter."""
    before = None
    while number:
        run = latest()
        metrics = None if run is None else run / "metrics.csv"
        size = metrics.read_bytes().count(b"\n") if metrics and metrics.exists() else 0
        before = size if before is None else min(before, size)
        if size - before >= number:
            break
        time.sleep(0.002)


def kill_and_resume(kills: int, seed: int, flags: list[str]) -> int:
    """Exit code of the last run, which nobody kills."""
    moments = random.Random(seed)
    for kill in range(kills):
        child = start(resumed(flags))
        wait_for_rows(moments.randint(0, ROWS))
        time.sleep(moments.uniform(0, LATE))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            code = os.waitstatus_to_exitcode(status)
            print(f"the run ended with {code} after {kill} kills", file=sys.stderr)
            return 1
    _, status = os.waitpid(start(resumed(flags)), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(kill_and_resume(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
