"""Trainings of several seeds, each a process with a run folder of its own below that of them all."""

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.command_line import as_tokens
from utils.distributed import PARENT, Interrupt
from utils.errors import UserError
from utils.files import load_checkpoint

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


def steps_done(parent: Path, seed: int) -> int:
    """The last step in the `metrics.csv` of a seed; 0 without one."""
    path = (folder_of(parent, seed) or parent) / "metrics.csv"  # the parent has none
    lines = path.read_text(errors="replace").splitlines() if path.exists() else ()
    return max((int(step) for line in lines if (step := line.partition(",")[0]).isdecimal()), default=0)


def train_seeds(
    script: Path,
    parent: Path,
    seeds: Sequence[int],
    jobs: int,
    steps: int,
    flags: Mapping[str, object],
) -> None:
    """Train a model for each seed, until all have done `steps` or a signal comes. If this process is killed,
    the trainings save their state and end.

    A training that has begun is resumed, and one that is complete stays as it is.

    Args:
        script: trains one model.
        parent: folder of the seeds' run folders and models.
        jobs: trainings at a time.
        flags: those of each training by name, but for its seed and places.

    Raises:
        UserError: trainings have failed, which are named; the others have gone on.
        SystemExit: after a signal, once all trainings have saved their state.
    """
    waiting = [seed for seed in seeds if not _is_complete(model_of(parent, seed), steps)]
    running: dict[int, subprocess.Popen[bytes]] = {}
    failed: dict[int, str] = {}
    start, begun = time.monotonic(), sum(steps_done(parent, seed) for seed in seeds)
    told = -math.inf
    with Interrupt() as interrupt:
        while (waiting or running) and not interrupt.signal:
            while waiting and len(running) < jobs:
                seed = waiting.pop(0)
                running[seed] = _start(script, parent, seed, flags)
            if time.monotonic() > told + TOLD_EVERY:
                told = time.monotonic()
                _tell(parent, seeds, steps, begun, told - start)
            time.sleep(POLL)
            for seed in [seed for seed, process in running.items() if process.poll() is not None]:
                if (code := running.pop(seed).returncode) and not interrupt.signal:
                    failed[seed] = (code > 0 and _last_line(parent, seed)) or f"exit code {code}"
                    log.warning("seed %d: %s", seed, failed[seed])
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    _tell(parent, seeds, steps, begun, time.monotonic() - start)
    if interrupt.signal:
        sys.exit(128 + interrupt.signal)
    if failed:
        said = "; ".join(f"seed {seed}: {line}" for seed, line in failed.items())
        raise UserError(f"{len(failed)} of {len(seeds)} trainings failed: {said}")


def _start(script: Path, parent: Path, seed: int, flags: Mapping[str, object]) -> subprocess.Popen[bytes]:
    """The process that begins the training of a seed or goes on with it, and writes `seed_<seed>.err`."""
    places = {"runs_dir": parent, "name": f"seed_{seed}", "model_name": model_of(parent, seed)}
    own = {"seed": seed, "resume": folder_of(parent, seed)}
    command = [sys.executable, str(script), *as_tokens({**flags, **places, **own})]
    environment = {**os.environ, PARENT: str(os.getpid())}
    with model_of(parent, seed).with_suffix(".err").open("wb") as errors:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        return subprocess.Popen(  # noqa: S603 (a script of this project)
            command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )


def _is_complete(model: Path, steps: int) -> bool:
    with suppress(UserError):
        return load_checkpoint(model).step >= steps
    return False


def _tell(parent: Path, seeds: Sequence[int], steps: int, begun: int, seconds: float) -> None:
    """Log one line on all trainings; `begun` steps were done `seconds` ago."""
    done = {seed: steps_done(parent, seed) for seed in seeds}
    rate = (sum(done.values()) - begun) / max(seconds, 1e-9)
    each = ", ".join(f"seed {seed}: {number}" for seed, number in done.items())
    left = tqdm.format_interval((steps * len(seeds) - sum(done.values())) / rate) if rate > 0 else "?"
    log.info("%s of %d steps, %.3g step/s, %s left", each, steps, rate, left)


def _last_line(parent: Path, seed: int) -> str:
    """The last line that the process of a seed wrote, without the name of its script."""
    text = model_of(parent, seed).with_suffix(".err").read_text(errors="replace")
    line = (text.splitlines() or [""])[-1]
    return line.partition("error: ")[2] or line
