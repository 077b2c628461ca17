"""Chooses where tensors live."""

from __future__ import annotations

import ctypes
import sys

import torch

from utils.distributed import environment, launched
from utils.errors import UserError


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device for `--device`, and `--threads` CPU threads from now on (None: torch's choice).

    `auto` is CUDA where there is a GPU, then MPS, then the CPU. On CUDA, TF32 and non-deterministic
    kernels are off: the numbers are those of float32, and the same seed gives the same run. Under
    torchrun each process of a machine takes a GPU of its own, unless a number names one.

    Raises:
        UserError: the machine does not have that device.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, here in present.items() if here)
    device = torch.device(name)
    if name == "cuda" and launched():
        device = torch.device("cuda", environment("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if present["cuda"] else 0
    if not present[device.type] or (device.type == "cuda" and (device.index or 0) >= gpus):
        here = [kind for kind, there in present.items() if there]
        count = f" ({gpus} GPUs)" if gpus else ""
        raise UserError(f"--device {name}: not on this machine; it has {', '.join(here)}{count}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return device


def keep_freed_memory() -> None:
    """Ask the C library to reuse large blocks instead of giving them back to the system.

    Each meta-step allocates the same temporaries of tens of MB. By default glibc maps and unmaps
    every one, and the page faults on first touch cost as much as the arithmetic. No effect on other
    C libraries, nor on results.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # parameter numbers of malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def use_huge_pages(*tensors: torch.Tensor) -> None:
    """Ask Linux to back large CPU tensors with huge pages, those that it has filled already included.

    For memory that is passed over again and again: in small pages, address translation takes as long
    as the reading. No effect elsewhere, where the kernel refuses, nor on results.
    """
    if sys.platform != "linux":
        return
    page, advise, collapse = 2**21, 14, 25  # MADV_HUGEPAGE and MADV_COLLAPSE of mman.h
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.device.type == "cpu":
            start = -(-tensor.data_ptr() // page) * page
            length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
            if length > 0:
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advise)
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), collapse)
