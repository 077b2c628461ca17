"""What has to happen before torch is loaded, and loads it: each script imports this module first.

Threads of OpenMP spin while they wait for each other. A thread that spins on the core that another run needs
makes both several times slower. `docs/performance.md` has the table that this number comes from.
"""

from __future__ import annotations

import os
import sys

from utils.errors import UserError, load_library

SPINS = "1000"  # turns of the loop in which GNU OpenMP waits before a thread sleeps
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

if not any(name in os.environ for name in WAITING):
    os.environ["GOMP_SPINCOUNT"] = SPINS

try:
    for name in ("numpy", "torch", "PIL.Image", "filelock", "tensorboardX", "tqdm", "typing_extensions"):
        load_library(name)
except UserError as error:  # a traceback would hide that something is to be installed
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2) from None
