"""Run folders, whose files are written during the run, so that a crash loses nothing.

`runs/<name>_<k>/` holds `config.json` (arguments, versions, time), `log.txt`, `metrics.csv` and TensorBoard
events; scripts add their own files. An interrupted run is resumed in its folder, by one process at a time.
"""

import csv
import io
import json
import logging
import os
import platform
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime, timezone
from itertools import count
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from utils.command_line import read_config, recorded
from utils.distributed import is_first
from utils.errors import UserError, refusing, try_to_write
from utils.files import write_text
from utils.flag import Flags

log = logging.getLogger("anml")


class _Terminal(logging.Handler):
    """Shows log lines on stdout, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with tqdm.external_write_mode(file=sys.stdout):
            try_to_write(f"{prefix}{self.format(record)}\n", sys.stdout)  # the run survives a closed stdout


def log_to_terminal() -> MemoryHandler:
    """Show the lines of the `anml` logger on stdout; returns the handler that keeps them for `log.txt`.

    A script calls this function first, since data is read before there is a run folder. Another call returns
    the same handler. Rank 0 alone prints.
    """
    for handler in log.handlers:
        if isinstance(handler, MemoryHandler):
            return handler
    memory = MemoryHandler(capacity=1)  # keeps all lines without a target, none with a target
    log.addHandler(_Terminal())
    log.addHandler(memory)
    log.setLevel(logging.INFO if is_first() else logging.CRITICAL)
    return memory


class _LogFile(logging.FileHandler):
    """The handler of `log.txt`. A full disk ends the run, where logging's own handler would go on."""

    def handleError(self, record: logging.LogRecord) -> NoReturn:  # noqa: N802 (logging's name)
        """Raise the error in hand: logging calls this method within an except block."""
        with _writing(Path(self.baseFilename).parent):
            raise


class Run:
    """One run's folder, log, metrics and TensorBoard events; a context manager.

    Scripts use :meth:`open`. Rank 0 alone writes; in other processes all methods do nothing.

    Attributes:
        folder: the run folder; in processes other than rank 0 the folder to resume, or that of all runs.
        started: start time, which identifies the run.
        saved: whether this process has saved a model.
    """

    def __init__(self, folder: Path, started: str = "") -> None:
        self.folder, self.started, self.saved, self._opened = folder, started, False, ExitStack()
        self._earlier: list[dict[str, str]] = []  # rows of a run that is resumed
        self._metrics: csv.DictWriter[str] | None = None  # made at the first row; an evaluation has no rows

    @classmethod
    def open(
        cls,
        runs_dir: Path,
        name: str,
        resume: Path | None,
        arguments: Flags,
        extra: Mapping[str, Any] | None = None,
        done: int = 0,
    ) -> "Run":
        """A new run in `runs_dir/<name>_<k>` with the smallest free k, or that of `resume` after step `done`.

        `config.json` gets the arguments, versions, machine, git commit, start time and `extra` (data hash,
        chosen device and so on). TensorBoard gets the arguments in the TEXT and HPARAMS tabs. Notices among
        the arguments are logged as warnings.

        A resume deletes points of TensorBoard after step `done`, and writes the present arguments to
        `config.json`, with time, machine and step of the resume under `resumed`.

        Raises:
            UserError: the folder cannot be made, read or written, another process uses the folder, or
                `extra["data_hash"]` differs from the run's: the data has changed.
        """
        if not is_first():
            return cls(resume or runs_dir)
        extra, now = {"plan": {}, **(extra or {})}, _circumstances()
        folder = resume or _new_folder(runs_dir, name)
        earlier = extra if resume is None else read_config(folder)
        data_hash, before = extra.get("data_hash"), earlier.get("data_hash")
        if data_hash and before is None:  # a run of commit d362890
            log.warning("%s records no data hash, so its images are not compared with those in use", folder)
        elif before != data_hash:
            raise UserError(f"the data is not that of {folder}: data hash {data_hash}, then {before}")
        config = {**now, **extra, **earlier, "name": folder.name, "plan": extra["plan"]}
        config["arguments"] = recorded(arguments, absolute=True)
        if resume is not None:
            config["resumed"] = [*config.get("resumed", []), {"step": done, **now}]
        run = cls(folder, str(config.get("started")))
        with _writing(folder), ExitStack() as opened:
            opened.callback(_lock(folder).release)
            run._start(opened, None if resume is None else done)
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
            if resume is None:
                run._describe({**recorded(arguments), **extra["plan"]})
            run._opened = opened.pop_all()  # `__exit__` closes it
        for notice in arguments.notices:
            log.warning(notice)
        if done:
            log.info("going on after step %d", done)
        return run

    def _start(self, opened: ExitStack, done: int | None) -> None:
        """Open the files, and read the rows of `metrics.csv` up to step `done` of a run that is resumed."""
        log_file = _LogFile(self.folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        opened.callback(log_file.close)
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        if done is not None:
            self._earlier = _earlier_rows(self.folder, done)
        # TensorBoard reads the files of a folder in the order of their names.
        path = self.folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}"
        self._events = opened.enter_context(path.open("xb"))
        self._write_event(0, file_version="brain.Event:2")
        # START makes TensorBoard drop the points after its step. The first START of a folder counts as the
        # start of the run and drops nothing, so there are two.
        for _ in range(0 if done is None else 2):
            self._write_event((done or 0) + 1, session_log=SessionLog(status=SessionLog.START))
        memory = log_to_terminal()
        opened.callback(memory.setTarget, None)
        memory.setTarget(log_file)
        memory.flush()

    def _describe(self, settings: Mapping[str, Any]) -> None:
        """Add the arguments to TensorBoard's TEXT and HPARAMS tabs.

        HPARAMS finds the arguments that differ between runs, and shows the last value of each curve. No list
        of columns is written, since TensorBoard would use it for all runs.
        """
        table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        text = summary.text("arguments", f"| argument | value |\n|---|---|\n{table}")
        values = {key: value for key, value in settings.items() if value is not None}
        plain = {key: x if isinstance(x, bool | int | float | str) else str(x) for key, x in values.items()}
        for content in (text, summary.hparams(plain, {})[1]):
            self._write_event(0, summary=content)

    def metrics(self, row: Mapping[str, float | int | str]) -> None:
        """Append a row to `metrics.csv`, whose columns are the keys of the first row.

        The first row of a run that is resumed may add columns, which are empty in the rows before. Rows after
        the step that the run goes on from are deleted then.

        Raises:
            UserError: the file cannot be written.
            ValueError: a key is not one of the first row's.
        """
        if not is_first():
            return
        with _writing(self.folder):
            if self._metrics is None:
                path = self.folder / "metrics.csv"
                columns = list(dict.fromkeys(key for each in (*self._earlier[:1], row) for key in each))
                before = csv.DictWriter(text := io.StringIO(), columns)
                before.writeheader()
                before.writerows(self._earlier)
                write_text(path, text.getvalue())
                # Line-buffered, so that a killed run keeps its rows.
                file = self._opened.enter_context(path.open("a", encoding="utf-8", newline="", buffering=1))
                self._metrics = csv.DictWriter(file, columns)
            self._metrics.writerow(row)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the TensorBoard curve of each tag in `values`, or raise UserError."""
        points = summary.Summary()
        for tag, value in values.items():
            points.MergeFrom(summary.scalar(tag, value))
        self._write_event(step, summary=points)

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add an image, `[H, W, 3]`, 0 to 255, to TensorBoard; raises UserError like :meth:`scalars`."""
        self._write_event(step, summary=summary.image(tag, pixels, dataformats="HWC"))

    def _write_event(self, step: int, **content: Any) -> None:
        """Append an event to TensorBoard's file: length and content, each with a checksum.

        (tensorboardX's `SummaryWriter` writes in a second thread. A full disk ends that thread without an
        error, and the run hangs once the queue between the threads is full.)
        """
        if not is_first():
            return
        data = Event(wall_time=time.time(), step=step, **content).SerializeToString()
        with _writing(self.folder):
            for part in (struct.pack("<Q", len(data)), data):
                self._events.write(part + struct.pack("<I", masked_crc32c(part)))
            self._events.flush()  # a killed run keeps its curves

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            with _writing(self.folder):
                self._opened.close()
            return
        # A full disk must not hide the error that ended the run.
        with suppress(UserError):
            log.error("ended by %s: %s", type(error).__name__, error, extra={"file_only": True})
        with suppress(OSError):
            self._opened.close()


class Progress:
    """Progress bar and log lines of a loop of `total` steps, with a report at every `every`-th and the last.

        with Progress(steps, every=50) as progress:
            for _ in range(steps):
                ...
                if progress.advance(loss=loss, accuracy=accuracy):
                    rate = progress.report()

    A terminal shows the bar, other outputs the log lines; `log.txt` has the lines in both cases.

    Args:
        done: steps that an earlier process did.

    Attributes:
        step: steps done.
    """

    def __init__(self, total: int, every: int = 1, unit: str = "step", done: int = 0) -> None:
        hidden = not (is_first() and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=hidden, leave=False)
        self.step, self._total, self._every, self._unit = done, total, every, unit
        self._since = (done, time.perf_counter())
        self._sums: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, **values: float) -> bool:
        """Count one step and show its values in the bar; returns whether a report is due."""
        self.step += 1
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._bar.set_postfix({key: f"{x:.4g}" for key, x in values.items()}, refresh=False)
        self._bar.update()
        return self.step % self._every == 0 or self.step == self._total

    def report(self) -> float:
        """Log means since the last report, speed and time left; returns the speed, in steps per second."""
        (step, then), now = self._since, time.perf_counter()
        steps = max(self.step - step, 1)
        rate = steps / max(now - then, 1e-9)
        means = " ".join(f"{key} {total / steps:.4g}" for key, total in self._sums.items())
        left = self._bar.format_interval((self._total - self.step) / rate)
        self._since, self._sums = (self.step, now), {}
        log.info(
            f"{self._unit} {self.step}/{self._total} {means}, {rate:.3g} {self._unit}/s, {left} left",
            extra={"file_only": not self._bar.disable},
        )
        return rate


def _new_folder(runs_dir: Path, name: str) -> Path:
    """Make the first free folder `<name>_<k>`; mkdir decides between two runs at the same time."""
    with _writing(runs_dir):
        runs_dir.mkdir(parents=True, exist_ok=True)
        for k in count():
            folder = runs_dir / f"{name}_{k}"
            with suppress(FileExistsError):
                folder.mkdir()
                break
    return folder


def _writing(folder: Path) -> AbstractContextManager[None]:
    """A block whose OSErrors become UserErrors about the run folder."""
    return refusing(f"write the run folder {folder}", "; choose with --runs_dir")


def _lock(folder: Path) -> FileLock:
    """A lock on a run folder, or UserError if another process uses the folder and could overwrite files.

    The system releases the lock when this process ends, in whatever way.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} is in use: another process is at work on this run") from error
    except OSError:
        pass  # not every file system has locks
    return lock


def _earlier_rows(folder: Path, done: int) -> list[dict[str, str]]:
    """The rows of `metrics.csv` for the steps 1 to `done`, without a last row that lacks its line end.

    The unfinished files of a killed process are deleted; those in a folder of --seeds may be of others.
    """
    path = folder / "metrics.csv"
    for draft in folder.glob(".*.*") if path.exists() else ():  # see `atomic_write`
        with suppress(OSError):
            draft.unlink()
    text = path.read_bytes().decode("utf-8-sig", "replace") if path.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith(("\n", "\r"))]
    cells = csv.DictReader(lines, quoting=csv.QUOTE_NONE)
    by_step = {row.get("step"): row for row in cells if None not in (*row, *row.values())}
    rows = [by_step[str(step)] for step in range(1, done + 1) if str(step) in by_step]
    if len(rows) < done:
        log.warning("%s lacks %d of the %d steps done", path, done - len(rows), done)
    return rows


def _circumstances() -> dict[str, Any]:
    """Time, versions, machine and git commit of this process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    machine = {"platform": platform.platform(), "cpu": cpu_name(), "cpus": os.cpu_count()}
    return {
        "started": datetime.now(timezone.utc).isoformat(),
        "versions": versions,
        "machine": {**machine, "threads": torch.get_num_threads()},
        "git": _git_state(),
    }


def cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, else from Python."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_state() -> dict[str, Any] | None:
    """The commit this code is at and whether it differs from it; None where this folder is no work tree of
    git, say a copy in one of another project."""
    root = Path(__file__).resolve().parents[1]
    # Git's own variables may name another repository, say within a hook; GIT_CONFIG and others say none.
    others = {name: x for name, x in os.environ.items() if not name.startswith("GIT_") or "CONFIG" in name}
    environment = {**others, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    # Without optional locks: looking at the user's repository must not write to it.
    words = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(  # noqa: S603 (fixed words)
            words, cwd=root, env=environment, check=True, capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    (_, _, commit), *lines = map(str.split, done.stdout.decode(errors="replace").splitlines())
    return {"commit": commit, "dirty": any(line[0] != "#" for line in lines)}
