"""The processes of a job (of torchrun or `--processes`), their devices, and the signals that stop them.

All processes draw the same random numbers and hold the same weights. Each process computes its shard of
independent work, and results are combined in the same order for every number of processes.
"""

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
PARENT = "ANML_PARENT"  # environment variable: the id of the process without which a training ends
STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C sends SIGINT, `kill` and Slurm send SIGTERM
MAY_DIFFER = (
    *("config", "runs_dir", "name", "cache_dir", "dataset_path", "model_name", "saved_model", "model"),
    *("device", "threads", "processes"),
)
"""Flags that may differ between the processes of a job. Contents of files are compared instead of paths."""


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
    value = os.environ.get(name, "")
    return int(value) if launched() and value.isdecimal() else alone


def refuse_several(what: str) -> None:
    """Raise UserError if this process is one of several; `what` is named in the message."""
    if environment("WORLD_SIZE", 1) > 1:
        raise UserError(f"{what} runs in one process: start it without --processes and torchrun")


def run_as(processes: int, argv: Sequence[str] | None = None) -> None:
    """Run this script as `processes` processes of this machine, and exit with their exit code.

    torch's launcher starts the processes, as torchrun does, and passes signals on. If a process fails, the
    launcher ends the others, and the exit code is that of the failed process. The processes share the cores.
    With one process, and within a job, this function returns at once.

    Raises:
        UserError: the start fails, or `argv`, the flags of the run, differs from the command line.
    """
    if processes == 1 or launched():
        return
    if argv is not None and [*argv] != sys.argv[1:]:
        raise UserError(f"--processes {processes} starts a script anew: give the flags on the command line")
    # Imported here, since these modules take a while to import.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process prints its error
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HERE}:0",  # any port that is free
        local_addr=HERE,  # else the machine's own name is looked up, which may fail
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
    """Whether this process is rank 0, which alone writes files and prints."""
    return environment("RANK", 0) == 0


@dataclass(frozen=True)
class Group:
    """The processes of a job.

    All processes call each method except `shard` together. UserError is raised if one of them has ended.

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
        """Raise UserError in all processes if a value differs between them; the message names the values."""
        every = self.gather({name: str(value) for name, value in values.items()})
        found = {name: dict.fromkeys(other.get(name, "none") for other in every) for name in values}
        differ = [f"{name} ({', '.join(each)})" for name, each in found.items() if len(each) > 1]
        if differ:
            raise UserError(
                f"the processes of this job differ in {', '.join(differ)}: start all of them with the same "
                "flags, files and code"
            )

    def one_before_others(self, work: Callable[[], T]) -> T:
        """The result of `work`. On each machine one process does `work` first, and fills the cache for the
        others."""
        first = environment("LOCAL_RANK", 0) == 0
        value = work() if first else None
        self.gather(None)  # a barrier
        return work() if value is None else value

    def leave(self) -> None:
        """End the group once all processes call this method; a process that left early would end the job."""
        if self.size > 1:
            self.gather(None)
            torch.distributed.destroy_process_group()


def join(device: torch.device, flags: Mapping[str, object]) -> Group:
    """The group of this process, once all processes have joined (nccl for GPUs, gloo for CPUs).

    Raises:
        UserError: another process cannot be reached, or has other flags or other code.
    """
    size = environment("WORLD_SIZE", 1)
    if size == 1:
        return Group()
    os.environ.setdefault("MASTER_PORT", "29500")  # torchrun's default
    with _others_answer():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda":
        atexit.register(_end_threads)
    group = Group(torch.distributed.get_rank(), size)
    compared = {f"--{name}": value for name, value in flags.items() if name not in MAY_DIFFER}
    group.check_same({**compared, "code": _code(), "torch": str(torch.__version__)})
    return group


def _code() -> str:
    """A short hash of the loaded modules of this project."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name) for name in names if name is not None}
    for path in sorted(files):
        if path.is_relative_to(root) and "site-packages" not in path.parts:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _end_threads() -> None:
    """End gloo's threads while Python still runs: a thread that outlives Python may abort the process and
    change its exit code (once in 120 exits of two processes right after a collective)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _others_answer() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of the backends and of the rendezvous
        cause = str(error).partition("Exception raised from")[0]  # a C++ backtrace follows
        raise UserError(
            f"process {environment('RANK', 0)} stops: {cause.strip() or type(error).__name__} (if that is "
            "about a connection, another process of the job has ended or cannot be reached, and what that "
            "one wrote last says why)"
        ) from error


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device of `--device`, or UserError if the machine lacks it; sets the number of CPU threads.

    `auto` is CUDA if there is a GPU, else MPS, else the CPU. On CUDA, TF32 and non-deterministic kernels are
    off: the numbers are those of float32, and the same seed gives the same run. `cuda` without a number gives
    each process of a machine its own GPU. Without `threads`, torch chooses the number.
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


class Interrupt:
    """A context that records the first Ctrl-C, SIGTERM or SIGHUP, so that a run can end after a whole step.

    A second Ctrl-C or SIGTERM acts as usual. A second SIGHUP is ignored: the kernel and the shell both send
    one when a terminal is closed. A SIGHUP that was ignored before (`nohup`) stays ignored.

    Within a job all later signals are ignored: its processes get each Ctrl-C twice, from the terminal and
    from the launcher.

    Attributes:
        signal: number of the first signal, 0 before it.
    """

    def __init__(self) -> None:
        self.signal, self._patient = 0, launched()

    def agree(self, group: Group) -> bool:
        """Whether any process of the group has received a signal or lost its parent, upon which all stop."""
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            self.signal = self.signal or signal.SIGTERM
        self.signal = max(group.gather(self.signal))
        return self.signal > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if not self._patient and number in STOPS:
            for each in STOPS:
                signal.signal(each, self._before[each])

    def __enter__(self) -> "Interrupt":
        hangup = [signal.SIGHUP] if sys.platform != "win32" else []
        heard = [number for number in hangup if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in (*STOPS, *heard)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
