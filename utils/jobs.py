"""Trainings of several seeds, each a process with a run folder of its own below that of them all."""

import csv
import logging
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from utils.command_line import as_tokens
from utils.distributed import Interrupt
from utils.errors import UserError

log = logging.getLogger("anml")

POLL = 0.2  # seconds between looks at the processes
TOLD_EVERY = 60  # seconds between lines of the log


def folder_of(parent: Path, seed: int) -> Path | None:
    """The run folder of a seed below `parent`; None where its training has not begun."""
    return next((path.parent for path in sorted(parent.glob(f"seed_{seed}_*/config.json"))), None)


def model_of(parent: Path, seed: int) -> Path:
    """The file of a seed's model below `parent`."""
    return parent / f"seed_{seed}.net"


def models_below(parent: Path) -> list[Path]:
    """The models of all seeds in a folder, in the order of the seeds.

    Raises:
        UserError: there is none.
    """
    found = {path.stem[5:]: path for path in parent.glob("seed_*.net")}
    if not found:
        raise UserError(f"--model {parent}: a folder, and none that --seeds has left models in")
    return [found[seed] for seed in sorted(found, key=lambda seed: (len(seed), seed))]


def steps_done(folder: Path | None) -> int:
    """The last step in the `metrics.csv` of a run folder; 0 without one."""
    path = folder / "metrics.csv" if folder else Path()
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8", errors="replace") as file:
        steps = [row[0] for row in csv.reader(file) if row and row[0].isdecimal()]
    return int(steps[-1]) if steps else 0


def train_seeds(
    script: Path,
    parent: Path,
    seeds: Sequence[int],
    jobs: int,
    steps: int,
    new: Mapping[str, object],
    changed: Mapping[str, object],
) -> None:
    """Train a model for each seed, until all have done `steps` or a signal comes.

    A training that has begun is resumed, and one that is complete stays as it is.

    Args:
        script: trains one model.
        parent: folder of the seeds' run folders and models.
        jobs: trainings at a time.
        new: flags of a new training, by name, but for its seed and places.
        changed: those of them that a resumed training takes anew.

    Raises:
        UserError: trainings have failed, which are named; the others have gone on.
        SystemExit: after a signal, once all trainings have saved their state.
    """
    start, begun = time.monotonic(), sum(steps_done(folder_of(parent, seed)) for seed in seeds)
    waiting = [seed for seed in seeds if not _is_complete(parent, seed, steps)]
    running: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    failed: dict[int, str] = {}
    told, stop = -math.inf, True
    with Interrupt() as interrupt, ExitStack() as opened:
        while running or (waiting and not interrupt.signal):
            while waiting and len(running) < jobs and not interrupt.signal:
                seed = waiting.pop(0)
                folder = folder_of(parent, seed)
                places = {"seed": seed, "runs_dir": parent, "name": f"seed_{seed}"}
                flags = {**new, **places} if folder is None else {**changed, "resume": folder}
                tokens = as_tokens({**flags, "model_name": model_of(parent, seed)})
                output = opened.enter_context(TemporaryFile())
                command = [sys.executable, str(script), *tokens]
                # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
                process = subprocess.Popen(  # noqa: S603 (a script of this project)
                    command, stdout=subprocess.DEVNULL, stderr=output, start_new_session=True
                )
                running[seed] = process, output
            if interrupt.signal and stop:
                for process, _ in running.values():
                    process.terminate()
                stop = False
            if time.monotonic() > told + TOLD_EVERY:
                told = time.monotonic()
                _tell(parent, seeds, steps, begun, told - start)
            for seed, (process, errors) in list(running.items()):
                if process.poll() is not None:
                    del running[seed]
                    if process.returncode and not interrupt.signal:
                        failed[seed] = _last_line(errors) or f"exit code {process.returncode}"
                        log.warning("seed %d: %s", seed, failed[seed])
            time.sleep(POLL)
    _tell(parent, seeds, steps, begun, time.monotonic() - start)
    if interrupt.signal:
        sys.exit(interrupt.exit_code)
    if failed:
        said = "; ".join(f"seed {seed}: {line}" for seed, line in failed.items())
        raise UserError(f"{len(failed)} of {len(seeds)} trainings failed: {said}")


def _is_complete(parent: Path, seed: int, steps: int) -> bool:
    return model_of(parent, seed).exists() and steps_done(folder_of(parent, seed)) >= steps


def _tell(parent: Path, seeds: Sequence[int], steps: int, begun: int, seconds: float) -> None:
    """Log one line on all trainings; `begun` steps were done `seconds` ago."""
    done = {seed: steps_done(folder_of(parent, seed)) for seed in seeds}
    rate = (sum(done.values()) - begun) / max(seconds, 1e-9)
    each = ", ".join(f"seed {seed}: {number}" for seed, number in done.items())
    left = timedelta(seconds=round((steps * len(seeds) - sum(done.values())) / rate)) if rate else "?"
    log.info("%s of %d steps, %.3g step/s, %s left", each, steps, rate, left)


def _last_line(errors: IO[bytes]) -> str:
    """The last line that a process wrote, without the name of its script."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").splitlines() or [""]
    return lines[-1].partition("error: ")[2] or lines[-1]
