"""A setting of the C library's allocator."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for reuse; no effect on other C libraries, nor on results.

    Each meta-step allocates the same temporaries of tens of MB. By default glibc maps and unmaps every one,
    and page faults cost a fifth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    trim_threshold, mmap_threshold = -1, -3  # parameter numbers of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    # glibc before 2.35 refuses more than 32 MiB.
    mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)
