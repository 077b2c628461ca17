"""The processes of one job, on one machine or several, as torchrun or `--processes` starts them; the devices
they use, and the signals that stop them.

All processes draw the same random numbers and hold the same weights. Each process computes its share of what
can be computed apart, and results are put together in the same order whatever the number of processes.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor

from utils.errors import UserError

T = TypeVar("T")
HERE = "127.0.0.1"
STOPS = (signal.SIGINT, signal.SIGTERM)  # a terminal sends the one, `kill` and Slurm the other
MAY_DIFFER = (
    *("config", "runs_dir", "name", "cache_dir", "dataset_path", "model_name", "saved_model", "model"),
    *("device", "threads", "processes"),
)
"""Flags that may differ between the processes of a job. The contents of what is read are compared."""


def launched() -> bool:
    """Whether this process is one of a job: torchrun and Kubernetes say so in RANK and WORLD_SIZE.

    Raises:
        UserError: RANK is no number below WORLD_SIZE.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and size.isdecimal()):
        return False
    if int(rank) >= int(size):
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}: unset both, or use ranks from 0 on")
    return True


def environment(name: str, alone: int) -> int:
    """RANK, LOCAL_RANK or WORLD_SIZE of this process; `alone` outside of a job."""
    return int(os.environ.get(name, alone)) if launched() else alone


def refuse_several(what: str) -> None:
    """Raise UserError where this process is one of several, since `what` runs in one."""
    if environment("WORLD_SIZE", 1) > 1:
        raise UserError(f"{what} runs in one process: start it without --processes and torchrun")


def run_as(processes: int, argv: Sequence[str] | None = None) -> None:
    """Run this script as `processes` processes of this machine, and leave with their exit code.

    torch's launcher starts them, as torchrun does with the same command. The launcher passes signals on.
    Where a process fails, the launcher ends the others, and the exit code is that of the failed process.
    The processes share the cores. `argv` holds the flags of the run. With one process, and within a job, this
    function returns at once.

    Raises:
        UserError: the processes cannot be started, or the flags are not those of the command line.
    """
    if processes == 1 or launched():
        return
    if argv is not None and [*argv] != sys.argv[1:]:
        raise UserError(f"--processes {processes} starts a script anew: give the flags on the command line")
    # Here, since these take a while to import.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say why
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HERE}:0",  # any port that is free
        local_addr=HERE,  # or the machine's own name is looked up, which may have no address
        run_id=str(os.getpid()),
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)  # a signal's number is negative
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--processes {processes}: {error}") from error
    sys.exit(0)


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return environment("RANK", 0) == 0


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one of them.

    All processes call each method but `shard` together. If one process has ended, the others raise UserError.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every `size`-th."""
        return items[self.rank :: self.size]

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the processes, the same bits in each of them."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _others_answer():
            torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, value: T) -> list[T]:
        """The processes' values, in the order of their ranks."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            with _others_answer():
                torch.distributed.all_gather_object(values, value)
        return values

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise UserError, in all processes, with the names of the values that are not the same in all."""
        every = self.gather({name: str(value) for name, value in values.items()})
        found = {name: dict.fromkeys(other.get(name, "none") for other in every) for name in values}
        differ = [f"{name} ({', '.join(each)})" for name, each in found.items() if len(each) > 1]
        if differ:
            raise UserError(
                f"the processes of this job differ in {', '.join(differ)}: start all of them with the same "
                "flags, files and code"
            )

    def one_before_others(self, work: Callable[[], T]) -> T:
        """What `work` returns. On each machine one process does `work` first, and fills the cache for the
        others."""
        first = environment("LOCAL_RANK", 0) == 0
        value = work() if first else None
        self.gather(None)  # which all processes wait for
        return work() if value is None else value

    def leave(self) -> None:
        """End the group when all processes are done: a process that leaves early would end the job."""
        if self.size > 1:
            self.gather(None)
            torch.distributed.destroy_process_group()


def join(device: torch.device, flags: Mapping[str, object]) -> Group:
    """The group of this process; waits for the others (nccl between GPUs, gloo between CPUs).

    Args:
        flags: those of this process, by name.

    Raises:
        UserError: the other processes cannot be reached, or have other flags or other code.
    """
    size = environment("WORLD_SIZE", 1)
    if size == 1:
        return Group()
    os.environ.setdefault("MASTER_PORT", "29500")  # which torchrun names as the usual one
    with _others_answer():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda":
        atexit.register(_end_threads)
    group = Group(torch.distributed.get_rank(), size)
    compared = {f"--{name}": value for name, value in flags.items() if name not in MAY_DIFFER}
    group.check_same({**compared, "code": _code(), "torch": str(torch.__version__)})
    return group


def _code() -> str:
    """A short hash of this project's modules that are loaded."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name) for name in names if name is not None}
    for path in sorted(files):
        if path.is_relative_to(root) and "site-packages" not in path.parts:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _end_threads() -> None:
    """End gloo's threads while Python still runs: a thread that outlives Python may abort the process, whose
    exit code is lost then (once in 120 times that two processes left right after a collective)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _others_answer() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # what the backends raise, and what looks for the others
        cause = str(error).partition("Exception raised from")[0]  # a C++ backtrace follows
        raise UserError(
            f"process {environment('RANK', 0)} stops: {cause.strip() or type(error).__name__} (if that is "
            "about a connection, another process of the job has ended or cannot be reached, and what that "
            "one wrote last says why)"
        ) from error


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device for `--device`, and `--threads` CPU threads from now on (None: torch's choice).

    `auto` is CUDA where there is a GPU, then MPS, then the CPU. On CUDA, TF32 and non-deterministic
    kernels are off: the numbers are those of float32, and the same seed gives the same run. `cuda` without a
    number gives each process of a job on one machine a GPU of its own.

    Raises:
        UserError: the machine does not have that device.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    here = [*gpus, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    if name == "cuda" or (name == "auto" and gpus):
        name = f"cuda:{environment('LOCAL_RANK', 0)}"
    if name not in ("auto", *here):
        raise UserError(f"--device {name}: not on this machine; it has {', '.join(here)}")
    device = torch.device(here[0] if name == "auto" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return device


def seed_layers(seed: int) -> None:
    """Seed the generators that layers draw from (dropout), on the CPU and on the devices in use.

    `torch.manual_seed` does the same, and takes more than a millisecond where there is no GPU.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Interrupt:
    """While this context is open, the first Ctrl-C, SIGTERM or SIGHUP is noted for the end of the step in
    hand, so that what is saved is never half a step; a second one acts as usual.

    A second SIGHUP does not act: the kernel and the shell both send one when a terminal is closed. A SIGHUP
    that was ignored before, as `nohup` has it, stays ignored.

    Args:
        patient: let no second signal act. A launcher passes on what its terminal got, so that its processes
            get one Ctrl-C twice.

    Attributes:
        signal: number of the first signal, 0 before it.
    """

    def __init__(self, patient: bool = False) -> None:
        self.signal, self._patient = 0, patient

    def agree(self, group: Group) -> bool:
        """Whether a signal asks any of the processes to stop, which all of them then do."""
        self.signal = max(group.gather(self.signal))
        return self.signal > 0

    @property
    def exit_code(self) -> int:
        """What a process that a signal has ended leaves by convention: 129, 130 or 143; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if not self._patient and number in STOPS:
            for each in STOPS:
                signal.signal(each, self._before[each])

    def __enter__(self) -> Interrupt:
        hangup = [signal.SIGHUP] if sys.platform != "win32" else []
        heard = [number for number in hangup if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in (*STOPS, *heard)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
