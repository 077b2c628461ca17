"""What has to happen before torch is loaded, which this module loads: each script imports this module first.

Threads of OpenMP spin while they wait for each other. A thread that spins on the core that another run needs
makes both several times slower. `docs/performance.md` has the table that this number comes from.

The project's packages have names that others have as well. Importing this module raises ImportError where
another package of one of these names is loaded already. A library that cannot be imported ends the process
with one line.
"""

import os
import sys
from pathlib import Path

SPINS = "1000"  # turns of the loop in which GNU OpenMP waits before a thread sleeps
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
ROOT = Path(__file__).resolve().parent

if not any(name in os.environ for name in WAITING):
    os.environ["GOMP_SPINCOUNT"] = SPINS

for name in ("datasets", "evaluation", "flags", "model", "tools", "utils"):
    file = getattr(sys.modules.get(name), "__file__", None)
    if name in sys.modules and ROOT not in Path(file or "/").resolve().parents:
        raise ImportError(
            f"another package called {name!r} is loaded already ({file}): run the scripts of {ROOT} in a "
            "process of their own, or import them before it"
        )

from utils.errors import UserError, load_library  # noqa: E402 (now that these are the project's)

try:
    for name in ("numpy", "torch", "PIL.Image", "filelock", "tensorboardX", "tqdm", "typing_extensions"):
        load_library(name)
    if sys.version_info < (3, 11):
        load_library("tomli")
except UserError as error:  # a traceback would hide that something is to be installed
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2) from None
