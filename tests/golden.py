"""Runs a fixed set of trainings and evaluations through the scripts, and hashes what they computed.

    python -m tests.golden            # compare with golden.json
    python -m tests.golden --record   # write golden.json

The hashes are those of one kind of processor and one release of torch, which `golden.json` names.
"""

import csv
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from evaluation.results import Key
from tests.forks import Forks
from utils.files import load_checkpoint
from utils.run import cpu_name

COLUMNS = (*Key._fields, "test", "train", "above_chance", "diverged")
RECORD = Path(__file__).with_name("golden.json")
NET = "--nm_channels=8 --pln_channels=16"
TRAIN = {
    f"train {order} {backend}": f"{NET} --steps=10 --backend={backend} {flags}"
    for order, flags in (("second order", ""), ("first order", "--first_order"))
    for backend in ("plain", "fast")
}
TRAIN["episodes"] = f"{NET} --learner=prototypes --steps=3 --ways=20"
TRAIN["iid"] = "--learner=iid --pln_channels=16 --steps=20"
TEST = {
    f"test {learner}": f"--schedule 20 --runs=2 --learner={learner} {flags}"
    for learner, flags in {"adam": "--lr=0.01", "ncm": "", "map": "", "slda": ""}.items()
}
TEST["search"] = "--schedule 5 10 --nested --lrs 0.01 0.003 --lr_search_runs=2 --runs=2 --rln=7"


def weights(path: Path) -> bytes:
    """Names and values of the weights in a model file."""
    state = load_checkpoint(path).state_dict
    return b"".join(name.encode() + value.contiguous().numpy().tobytes() for name, value in state.items())


def scores(path: Path) -> bytes:
    """The columns of a `scores.csv` that all commits have."""
    with path.open(newline="") as file:
        lines = [",".join(row[name] for name in COLUMNS) for row in csv.DictReader(file)]
    return "".join(f"{line}\n" for line in (",".join(COLUMNS), *lines)).encode()


def compute() -> dict[str, str]:
    """The hash of each run."""
    found: dict[str, bytes] = {}
    forks = Forks()
    with tempfile.TemporaryDirectory() as name, forks.server:
        folder = Path(name, "runs")

        def run(script: str, *flags: str) -> None:
            if forks.wait(forks.start(folder, script, *flags)):
                sys.exit(Path(f"{folder}.stderr").read_text())

        def train(key: str, flags: str) -> None:
            flags = f"{flags} --dataset=glyphs --threads=1 --runs_dir=."
            run("mrcl_classification", *flags.split(), f"--name={key}", f"--model_name={key}.net")

        folder.mkdir()
        for key, flags in TRAIN.items():
            train(key, flags)
            found[key] = weights(folder / f"{key}.net")
        train("resumed", TRAIN["train second order plain"].replace("--steps=10", "--steps=5"))
        run("mrcl_classification", "--resume=resumed_0", "--steps=10")
        found["resumed"] = weights(folder / "resumed.net")
        model = "--model=train second order plain.net"
        for key, flags in TEST.items():
            flags = f"{flags} --dataset=glyphs --threads=1 --runs_dir=."
            run("evaluate_classification", *flags.split(), f"--name={key}", model)
            found[key] = scores(folder / f"{key}_0/scores.csv")
    return {key: hashlib.sha256(value).hexdigest()[:16] for key, value in found.items()}


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
