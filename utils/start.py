"""What has to happen before torch is loaded: each script imports this module first.

Threads of OpenMP spin while they wait for each other. A thread that spins on the core that another run needs
makes both several times slower. `docs/performance.md` has the table that this number comes from.
"""

from __future__ import annotations

import os

SPINS = "1000"  # turns of the loop in which GNU OpenMP waits before a thread sleeps
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

if not any(name in os.environ for name in WAITING):
    os.environ["GOMP_SPINCOUNT"] = SPINS
