"""A run folder: everything a run leaves behind, written as it goes, so that a crash keeps it.

`runs/<name>_<k>/` holds `config.json` (what was asked, with what, when), `log.txt`, `metrics.csv`
and TensorBoard events; scripts add their own files. A run that was interrupted goes on in its folder,
in one process at a time.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory
from tensorboardX.summary import hparams
from tqdm import tqdm

from utils.command_line import read_config, recorded
from utils.distributed import is_first
from utils.errors import UserError, try_to_write
from utils.files import atomic_write, remove_drafts, sync, write_text
from utils.flag import Flags

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("anml")


class _Terminal(logging.Handler):
    """Shows log lines on stdout, above a progress bar, and keeps those that precede a run."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.earlier: list[logging.LogRecord] = []
        self.in_run = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.in_run:
            self.earlier.append(record)
        if getattr(record, "file_only", False):
            return
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with tqdm.external_write_mode(file=sys.stdout):
            try_to_write(f"{prefix}{self.format(record)}\n", sys.stdout)  # the run goes on without a reader


def log_to_terminal() -> _Terminal:
    """Show the lines of the `anml` logger on stdout; the next run's `log.txt` gets them as well.

    A script calls it first, since it reads its data before it has a run. Calling again is harmless.
    Of several processes, the first alone speaks.
    """
    for handler in log.handlers:
        if isinstance(handler, _Terminal):
            return handler
    terminal = _Terminal()
    log.addHandler(terminal)
    log.setLevel(logging.INFO if is_first() else logging.CRITICAL)
    return terminal


class _LogFile(logging.FileHandler):
    """`log.txt`, which reports a full disk instead of printing a traceback and going on.

    Whoever has it open has the run folder: two processes would cut and write each other's files.

    Raises:
        UserError: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        self.folder = folder
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        if sys.platform != "win32":
            assert self.stream is not None  # it is open from the start
            try:  # the system unlocks it when the process ends, however it ends
                fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.close()
                raise UserError(f"{folder} is in use: another process is at work on this run") from error
            except OSError:
                pass  # not every file system has locks

    def handleError(self, record: logging.LogRecord) -> NoReturn:  # noqa: N802 (logging's name)
        """Called within the except block of whatever went wrong."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise _unwritable(self.folder, error) from error
        raise


class _EventFile:
    """The file of TensorBoard events, which tensorboardX writes in a thread of its own.

    An error would end that thread, and a run without it waits for ever as soon as its queue is full.
    So the error is kept here for the thread that can report it, and nothing more is written.
    """

    PREFIX = "run"  # of a path, tells tensorboardX to open files here

    def __init__(self) -> None:
        self.error: OSError | None = None

    def directory_check(self, path: str) -> None:
        """The run folder exists."""

    def open(self, path: str) -> _EventFile:
        # Without a buffer, so that a killed run keeps its curves.
        self._file = io.FileIO(path.removeprefix(f"{self.PREFIX}:"), "w")
        return self

    def _attempt(self, action: Callable[..., object], *values: bytes) -> None:
        if self.error is None:
            try:
                action(*values)
            except OSError as error:
                self.error = error

    def write(self, data: bytes) -> None:
        self._attempt(self._file.write, data)

    def flush(self) -> None:
        """Nothing waits to be written."""

    def close(self) -> None:
        self._attempt(self._file.close)


class Run:
    """One run's folder, log, metrics and TensorBoard events; a context manager.

    Of several processes the first alone writes; `create` and `resume` see to that.

    Attributes:
        folder: the run folder, made by :meth:`create`.
    """

    def __init__(self, folder: Path, done: int | None = None):
        """Open the writers in an existing folder; scripts use :meth:`open`.

        Args:
            done: cut what an earlier process wrote back to this many steps, and go on after them.
        """
        self.folder = folder
        self._metrics: TextIO | None = None  # opened for the first row: an evaluation has none
        self._event_file = _EventFile()
        register_writer_factory(_EventFile.PREFIX, self._event_file)
        try:
            with ExitStack() as opened:
                self._log_file = opened.enter_context(closing(_LogFile(folder)))
                self._columns = None if done is None else _cut_back(folder, done)
                self._events = SummaryWriter(
                    f"{_EventFile.PREFIX}:{folder}",
                    flush_secs=10,
                    purge_step=None if done is None else done + 1,
                    filename_suffix="" if done is None else f".{done}",
                )
                opened.pop_all()  # all are open: `close` closes them
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._terminal = log_to_terminal()
        self._terminal.in_run = True
        for record in self._terminal.earlier:
            self._log_file.handle(record)
        self._terminal.earlier.clear()
        log.addHandler(self._log_file)

    @classmethod
    def open(
        cls,
        runs_dir: Path,
        name: str,
        resume: Path | None,
        arguments: Flags,
        extra: Mapping[str, Any] | None = None,
        done: int = 0,
    ) -> Run:
        """The run in the folder `resume`, after step `done`, or a new one.

        Raises:
            UserError: as :meth:`create` and :meth:`resume` do.
        """
        if resume is None:
            return cls.create(runs_dir, name, arguments, extra)
        run = cls.resume(resume, arguments, done, extra)
        if done:
            log.info("going on after step %d", done)
        return run

    @classmethod
    def create(
        cls,
        runs_dir: Path,
        name: str,
        arguments: Flags,
        extra: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make `runs_dir/<name>_<k>` with the smallest free k, and record what is run and where.

        `config.json` gets the arguments, versions, machine, git commit, start time and `extra`
        (say the plan, the data hash and the device chosen); TensorBoard gets the settings as a table.
        Notices among the arguments are logged as warnings.

        Raises:
            UserError: the folder cannot be made or written.
        """
        if not is_first():
            return _Bystander(Path(runs_dir))
        extra = extra or {}
        settings = {**recorded(arguments), **extra.get("plan", {})}
        folder = _new_folder(Path(runs_dir), name)
        config = {
            "name": folder.name,
            "arguments": recorded(arguments, absolute=True),
            **_circumstances(),
            **extra,
        }
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        run = cls(folder)
        table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        run.text("arguments", f"| argument | value |\n|---|---|\n{table}")
        run.hyperparameters(settings)
        for notice in arguments.notices:
            log.warning(notice)
        return run

    @classmethod
    def resume(
        cls,
        folder: Path,
        arguments: Flags,
        done: int,
        extra: Mapping[str, Any] | None = None,
    ) -> Run:
        """Go on in the folder of a run that was interrupted, as if it ended after step `done`.

        Rows of `metrics.csv` and points of TensorBoard after that step go. `config.json` gets the
        arguments as they are now, and under `resumed` when, where and at which step.

        Raises:
            UserError: the folder cannot be read or written, another process is at work in it, or
                `extra["data_hash"]` is not that of the run: it would go on with other data.
        """
        if not is_first():
            return _Bystander(folder)
        config = read_config(folder)
        data_hash = (extra or {}).get("data_hash")
        earlier_hash = config.get("data_hash", data_hash)  # absent in runs of commit d362890
        if earlier_hash != data_hash:
            raise UserError(f"the data is not that of {folder}: data hash {data_hash}, then {earlier_hash}")
        run = cls(folder, done)
        if data_hash and "data_hash" not in config:
            log.warning("%s records no data hash, so its images are not compared with those in use", folder)
        earlier = config.get("resumed")
        resumed = [*(earlier if isinstance(earlier, list) else []), {"step": done, **_circumstances()}]
        config = {**(extra or {}), **config, "name": folder.name}
        config |= {key: value for key, value in (extra or {}).items() if key == "plan"}
        config |= {"arguments": recorded(arguments, absolute=True), "resumed": resumed}
        try:
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        except UserError:
            run.close()
            raise
        for notice in arguments.notices:
            log.warning(notice)
        return run

    def metrics(self, row: Mapping[str, float | int | str]) -> None:
        """Append a row to `metrics.csv`; the first row's keys are its columns.

        Raises:
            UserError: the file cannot be written.
            ValueError: the keys differ from the first row's.
        """
        try:
            if self._metrics is None:
                # Line-buffered, so that a killed run keeps its rows.
                path = self.folder / "metrics.csv"
                self._metrics = path.open("a", encoding="utf-8", newline="", buffering=1)
            if self._columns is None:
                self._columns = tuple(row)
                csv.writer(self._metrics).writerow(self._columns)
            if tuple(row) != self._columns:
                raise ValueError(f"metrics has the columns {self._columns}, not {tuple(row)}")
            csv.writer(self._metrics).writerow(row.values())
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def sync(self) -> None:
        """Put the rows of `metrics.csv` on disk, before a training state that counts on them.

        Raises:
            UserError: the disk is full.
        """
        try:
            if self._metrics is not None:
                sync(self._metrics.fileno())
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the TensorBoard curve of each tag in `values`.

        Raises:
            UserError: an earlier point could not be written.
        """
        if self._event_file.error is not None:
            raise _unwritable(self.folder, self._event_file.error)
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def text(self, tag: str, markdown: str) -> None:
        """Add a text to TensorBoard."""
        self._events.add_text(tag, markdown, 0)

    def hyperparameters(self, settings: Mapping[str, object]) -> None:
        """Make this run a line of TensorBoard's HPARAMS tab.

        No list of columns stands beside it, which would be that of all runs: TensorBoard finds the arguments
        that differ between runs by itself, and shows the last value of each curve.
        """
        values = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in settings.items()
            if value is not None
        }
        _, start, _ = hparams(values, {})
        self._events.file_writer.add_summary(start, 0)

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add an image, `[H, W, 3]`, 0 to 255, to TensorBoard."""
        self._events.add_image(tag, pixels, step, dataformats="HWC")

    @contextmanager
    def progress(self, total: int, every: int = 1, unit: str = "step", done: int = 0) -> Iterator[Progress]:
        """Follow a loop of `total` steps that reports every `every` of them, and at its last.

        A bar shows it on a terminal, log lines elsewhere; `log.txt` has the lines either way.

        Args:
            done: steps of them that an earlier process did.
        """
        with tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty(), leave=False) as bar:
            yield Progress(bar, total, every, unit, done)

    def close(self) -> None:
        """Write everything out; the run takes no more.

        Raises:
            UserError: something could not be written.
        """
        log.removeHandler(self._log_file)
        self._terminal.in_run = False
        failed = None
        for opened in (self._events, self._log_file, self._metrics):
            try:
                if opened is not None:
                    opened.close()
            except OSError as error:
                failed = error
        failed = failed or self._event_file.error
        if failed is not None:
            raise _unwritable(self.folder, failed) from failed

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(UserError):  # the disk may be full: what ended the run is what is to be told
            log.error("ended by %s: %s", type(error).__name__, error, extra={"file_only": True})
        with suppress(UserError):
            self.close()


class _Bystander(Run):
    """What processes other than the first have for a run: it takes everything and writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def metrics(self, row: Mapping[str, float | int | str]) -> None:
        pass

    def sync(self) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        pass

    @contextmanager
    def progress(self, total: int, every: int = 1, unit: str = "step", done: int = 0) -> Iterator[Progress]:
        with tqdm(total=total, disable=True) as bar:
            yield Progress(bar, total, every, unit, done)

    def close(self) -> None:
        pass


class Progress:
    """Where a loop stands.

        with run.progress(steps, every=50) as progress:
            for _ in range(steps):
                ...
                if progress.advance(loss=loss, accuracy=accuracy):
                    rate = progress.report()

    Attributes:
        step: steps done.
    """

    def __init__(self, bar: tqdm[Any], total: int, every: int, unit: str, done: int = 0):
        self.step = done
        self._bar, self._total, self._every, self._unit = bar, total, every, unit
        self._since = (done, time.perf_counter())
        self._sums: dict[str, float] = {}

    def advance(self, **values: float) -> bool:
        """Count one step with its values; true if it is one to report. The bar shows each step."""
        self.step += 1
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._bar.set_postfix(_short(values), refresh=False)
        self._bar.update()
        return self.step % self._every == 0 or self.step == self._total

    def report(self) -> float:
        """Log the mean of each value since the last report, speed and time left.

        Returns:
            Steps per second since the last report.
        """
        now = time.perf_counter()
        step, then = self._since
        steps = max(self.step - step, 1)
        rate = steps / max(now - then, 1e-9)
        means = _short({key: total / steps for key, total in self._sums.items()})
        self._since, self._sums = (self.step, now), {}
        log.info(
            "%s %d/%d %s, %.3g %s/s, %s left",
            self._unit,
            self.step,
            self._total,
            " ".join(f"{key} {value}" for key, value in means.items()),
            rate,
            self._unit,
            timedelta(seconds=round((self._total - self.step) / rate)),
            extra={"file_only": not self._bar.disable},
        )
        return rate


def _short(values: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.4g}" for key, value in values.items()}


def _new_folder(runs_dir: Path, name: str) -> Path:
    """Make the first folder of its name that is free; mkdir decides between two runs at once."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        for k in count():
            folder = runs_dir / f"{name}_{k}"
            if not folder.exists():
                try:
                    folder.mkdir()
                except FileExistsError:
                    continue
                return folder
    except OSError as error:
        raise _unwritable(runs_dir, error) from error
    raise AssertionError("count() does not end")


def _cut_back(folder: Path, done: int) -> tuple[str, ...] | None:
    """Cut `metrics.csv` back to the steps 1 to `done`, and return its columns.

    What goes are rows of steps that will be done again, the last one if it is torn, and the drafts of
    files that a killed process left.
    """
    for name in ("config.json", "metrics.csv", "model.net", "model_*.net", "state.pt"):
        remove_drafts(folder / name)
    path = folder / "metrics.csv"
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    except FileNotFoundError:
        if done == 0:  # also of an evaluation, which has no rows
            return None
        lines = []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    header, *rows = lines or [b""]
    if not header.startswith(b"step,") or not header.endswith(b"\n"):
        header, rows = b"", []
    kept = {int(row.partition(b",")[0]): row for row in rows if re.match(rb"\d{1,15},.*\n", row)}
    wanted = [kept[step] for step in range(1, done + 1) if step in kept]
    if len(wanted) < done:
        log.warning("%s lacks %d of the %d steps done", path, done - len(wanted), done)
    with atomic_write(path) as file:
        file.writelines([header, *wanted])
    return tuple(header.decode("utf-8", "replace").strip().split(",")) if header else None


def _circumstances() -> dict[str, Any]:
    """When, where and with what code a process works on a run."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "git": _git_state(),
    }


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the run folder {folder}: {error.strerror or error}; choose with --runs_dir"
    )


def cpu_name() -> str:
    """The processor's name where Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_state() -> dict[str, Any] | None:
    """The commit this code is at and whether it differs from it; None outside a git work tree."""
    git = shutil.which("git")
    if git is None:
        return None
    project = str(Path(__file__).resolve().parents[1])

    def ask(*command: str) -> str:
        # Without optional locks: looking at the user's repository must not write to it.
        return subprocess.run(  # noqa: S603 (fixed words and this project's folder)
            [git, "--no-optional-locks", "-C", project, *command],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
