"""The processes of one job, on one machine or several, as torchrun starts them.

All processes draw the same random numbers and hold the same weights; each computes its share of what
can be computed apart, and results are put together in the same order whatever the number of processes.
Without torchrun there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from utils.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")
# What the launchers of Open MPI, of MPICH and Intel MPI, of MVAPICH, Horovod and LSF's jsrun tell a process.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE", "JSM_NAMESPACE_SIZE")


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def environment(name: str, alone: int) -> int:
    """What torchrun says of this process: RANK, LOCAL_RANK or WORLD_SIZE; `alone` without it."""
    return int(os.environ[name]) if launched() else alone


def other_launcher() -> str | None:
    """How something else than torchrun says that it started this process as one of several; None if not.

    Within an allocation of Slurm, `SLURM_NTASKS` alone says nothing: a shell and a batch script have it
    too, and are one process. Those of `srun` have a step.
    """
    if launched():
        return None
    step = _number("SLURM_STEP_ID", -1)
    names = list(SIZES)
    if "RANK" in os.environ:
        names.append("WORLD_SIZE")
    # The highest numbers are those of the steps that batch scripts and the shells of salloc are.
    if 0 <= step < 2**32 - 16 or _number("SLURM_PROCID", 0) > 0:
        names.append("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS")
    return next((f"{name}={size}" for name in names if (size := _number(name, 1)) > 1), None)


def _number(name: str, otherwise: int) -> int:
    """The whole number in an environment variable that anybody may have set."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


def refuse_several(what: str) -> None:
    """Raise UserError where a launcher started this process, since `what` runs in one."""
    launcher = "torchrun" if launched() else other_launcher()
    if launcher is not None:
        raise UserError(
            f"{what} runs in one process: start it without --processes, torchrun or mpirun ({launcher})"
        )


def run_as(processes: int) -> None:
    """Run this script as so many processes of this machine, and leave with what they leave with.

    torch's launcher starts them, as torchrun does with the same command. It passes signals on, and ends all
    where one fails, whose exit code counts. They share the cores. Returns where there is nothing to start:
    for one process, and in those that a launcher has started.

    Raises:
        UserError: the processes cannot be started.
    """
    if processes == 1 or launched():
        return
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
        rdzv_endpoint="localhost:0",  # any port that is free
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

    Each method but `shard` is called by all processes together. Where one of them has ended, the
    others raise UserError.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: where tensors travel from: that of the work.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Those of `items` that are this process's to do: every `size`-th."""
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

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        with _others_answer():
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: T) -> list[T]:
        """The processes' values, in the order of their ranks."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            with _others_answer():
                torch.distributed.all_gather_object(values, value)
        return values

    def check_same(self, what: str, value: object) -> None:
        """Raise UserError where the processes do not all have the same `value`."""
        if len(set(self.gather(value))) > 1:
            raise UserError(
                f"the processes of this job differ in their {what}: all machines have to see the same files"
            )

    def one_before_others(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by one process of each machine before the others of it.

        So the others find in the cache what took that one minutes.
        """
        if environment("LOCAL_RANK", 0) == 0:
            value = work()
            self.wait()
            return value
        self.wait()
        return work()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.largest(0)

    def leave(self) -> None:
        """End the group when all processes are done; one that leaves early would end the job."""
        if self.size > 1:
            self.wait()
            torch.distributed.destroy_process_group()


def join(device: torch.device) -> Group:
    """The group of this process; waits for the others (nccl between GPUs, gloo between CPUs).

    Raises:
        UserError: the others cannot be reached, or do not know of each other.
    """
    launcher = other_launcher()
    if launcher is not None:
        raise UserError(
            f"this is one of several processes that were not started by torchrun ({launcher}): each would "
            "do all of the work and write the same files. Start them with torchrun "
            f"(docs/distributed.md); for a run of its own, unset {launcher.partition('=')[0]}"
        )
    size = environment("WORLD_SIZE", 1)
    if size == 1:
        return Group()
    with _others_answer():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda":
        atexit.register(_end_threads)
    return Group(torch.distributed.get_rank(), size, device)


def _end_threads() -> None:
    """End gloo's threads while Python still runs, however a process leaves.

    One that lets go of its last tensor when the interpreter has begun to end aborts the process (seen once in
    120 times that two left right after a collective), and with it the exit code that says why.
    """
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
