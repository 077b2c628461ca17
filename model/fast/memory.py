"""How the C library and Linux are asked to treat large tensors."""

from __future__ import annotations

import ctypes
import sys

import torch


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
