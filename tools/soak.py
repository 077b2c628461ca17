"""Many small training steps, to see that memory and open files do not grow. Not one of the tests.

    python -m tools.soak [STEPS]

Expected time: two minutes for 2,000 steps. Exits 1 where something grew.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import os
import sys
import tempfile
from pathlib import Path

import mrcl_classification
from tests.conftest import TINY
from utils.command_line import HelpFirst
from utils.errors import run_script
from utils.flag import whole
from utils.run import Run

STEPS = 2000
WARM_UP = 500  # steps until the allocator and all caches have what they need
WIDE = ["--nm_channels=16", "--pln_channels=64"]  # enough that weights left behind by each step would show
GROWTH = 0.01  # of the resident memory after these, that is taken for noise


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Files that this process has open (Linux)."""
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> None:
    parser = HelpFirst(prog="python -m tools.soak", description=__doc__)
    parser.add_argument(
        "steps", type=whole(1), nargs="?", default=STEPS, metavar="STEPS", help="2000 if not given"
    )
    steps = parser.parse_args().steps
    seen: list[tuple[int, int]] = []
    write = Run.metrics

    def metrics(run: Run, row: dict[str, float]) -> None:
        write(run, row)
        seen.append((resident(), open_files()))

    Run.metrics = metrics  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        flags = [f"--steps={steps}", "--save_every=100", "--cache_dir=cache", "--log_every=100"]
        sys.argv = ["mrcl_classification.py", *TINY, *WIDE, *flags]
        mrcl_classification.main()
    (memory, files), (memory_after, files_after) = seen[min(WARM_UP, steps // 2)], seen[-1]
    growth = memory_after / memory - 1
    print(f"resident memory {memory / 2**20:.1f} MiB, then {memory_after / 2**20:.1f} MiB: {growth:+.2%}")
    print(f"open files {files}, then {files_after}")
    sys.exit(growth > GROWTH or files_after > files)


if __name__ == "__main__":
    run_script(main)
