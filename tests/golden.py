"""Runs a fixed set of trainings and evaluations through the scripts, and hashes what they computed.

    python -m tests.golden            # compare with golden.json
    python -m tests.golden --record   # write golden.json

The hashes are those of one kind of processor and one release of torch, which `golden.json` names.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from utils.files import load_checkpoint
from utils.run import cpu_name

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("golden.json")
SMALL = ["--dataset=glyphs", "--threads=1"]
NET = ["--nm_channels=8", "--pln_channels=16"]
TRAIN = {
    f"train {order} {backend}": ["mrcl_classification.py", *NET, "--steps=10", f"--backend={backend}", *flags]
    for order, flags in (("second order", []), ("first order", ["--first_order"]))
    for backend in ("plain", "fast")
}
TRAIN["episodes"] = ["mrcl_classification.py", *NET, "--learner=prototypes", "--steps=3", "--ways=20"]
TRAIN["iid"] = ["mrcl_classification.py", "--learner=iid", "--pln_channels=16", "--steps=20"]
LEARNERS = {"adam": ["--lr=0.01"], "ncm": [], "map": [], "slda": []}


def run(folder: Path, script: str, *flags: str) -> None:
    """Run a script in `folder` with the cache that all share."""
    command = [sys.executable, str(ROOT / script), *SMALL, f"--cache_dir={folder / 'cache'}", *flags]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def weights(path: Path) -> str:
    """A hash of the weights in a model file."""
    digest = hashlib.sha256()
    for name, value in load_checkpoint(path).state_dict.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def compute() -> dict[str, str]:
    """The hash of each run."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, (script, *flags) in TRAIN.items():
            run(folder, script, *flags, "--model_name=m.net", "--name=run")
            found[key] = weights(folder / "m.net")
            (folder / "m.net").rename(folder / f"{key}.net")
        flags = [*TRAIN["train second order plain"][1:-1], "--backend=plain", "--model_name=m.net"]
        run(folder, "mrcl_classification.py", *flags, "--steps=5", "--name=resumed")
        command = [
            sys.executable,
            str(ROOT / "mrcl_classification.py"),
            "--resume=runs/resumed_0",
            "--steps=10",
        ]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        found["resumed"] = weights(folder / "m.net")
        model = "--model=train second order plain.net"
        for learner, flags in LEARNERS.items():
            more = ["--schedule", "20", "--runs=2", f"--name={learner}", f"--learner={learner}", *flags]
            run(folder, "evaluate_classification.py", model, *more)
            content = (folder / f"runs/{learner}_0/scores.csv").read_bytes()
            found[f"test {learner}"] = hashlib.sha256(content).hexdigest()[:16]
        search = [
            "--schedule",
            "5",
            "10",
            "--nested",
            "--lrs",
            "0.01",
            "0.003",
            "--lr_search_runs=2",
            "--runs=2",
        ]
        run(folder, "evaluate_classification.py", model, *search, "--rln=7", "--name=search")
        content = (folder / "runs/search_0/scores.csv").read_bytes()
        found["search"] = hashlib.sha256(content).hexdigest()[:16]
    return found


def main() -> None:
    here = {"cpu": cpu_name(), "torch": str(torch.__version__)}
    found = compute()
    if "--record" in sys.argv:
        RECORD.write_text(json.dumps({**here, "hashes": found}, indent=2) + "\n")
        return
    recorded = json.loads(RECORD.read_text())
    moved = [key for key, value in recorded["hashes"].items() if found.get(key) != value]
    print(f"recorded on {recorded['cpu']} with torch {recorded['torch']}; here {here}")
    print(f"moved: {', '.join(moved)}" if moved else f"all {len(found)} as recorded")
    sys.exit(bool(moved))


if __name__ == "__main__":
    main()
