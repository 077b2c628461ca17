"""Test whether two evaluations differ: Mann-Whitney U at each class count, as in the paper.

python -m tools.compare_results runs/anml_0 runs/oml_0
python -m tools.compare_results results/anml.csv runs/Omni_test_traj_3/results.json
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

from dataclasses import MISSING
from pathlib import Path
from typing import Any

from evaluation.results import Results, aligned, compare, read_results
from model.scores import accuracies
from utils.command_line import parse
from utils.errors import UserError, run_script, say
from utils.flag import Flags, file_path, flag


def describe(path: Path, results: Results) -> str:
    """One line on a result: where it is, what it is of."""
    treatment = results.about.get("treatment", "treatment not recorded")
    models = len({row["model"] for row in results.rows})
    diverged = sum(row["diverged"] for row in results.rows)
    text = f"{path}: {treatment}, {len(results.rows)} runs of {models} model{'s' * (models > 1)}"
    return f"{text}, {diverged} of them diverged" if diverged else text


def table(lines: list[dict[str, Any]]) -> str:
    """The comparison for the terminal: mean accuracies in percent, U of A, two-sided p."""
    headings = [text for key in accuracies() for text in (f"A {key} %", f"B {key} %", "U", "p")]
    rows = [["classes", "runs", *headings]]
    for line in lines:
        cells = [str(line["classes"]), f"{line['runs_a']}/{line['runs_b']}"]
        for key in accuracies():
            means = [f"{100 * line[f'{key}_{side}']:.1f}" for side in "ab"]
            cells += [*means, f"{line[f'{key}_u']:g}", f"{line[f'{key}_p']:.2g}"]
        rows.append(cells)
    return aligned(rows)


def results_flag(name: str) -> Any:
    text = "run folder of an evaluation, or its results.csv or results.json"
    return flag(MISSING, file_path, text, metavar=name)


class Comparison(Flags):
    """Test whether two evaluations differ, at each class count that both have.

    python -m tools.compare_results runs/a_0 runs/b_0
    """

    a: Path = results_flag("A")
    b: Path = results_flag("B")


def main() -> None:
    args = parse(Comparison)
    paths = {"A": args.a, "B": args.b}
    results = {name: read_results(path) for name, path in paths.items()}
    counts = {name: {row["classes"] for row in result.rows} for name, result in results.items()}
    lines = compare(results["A"].rows, results["B"].rows)
    if not lines:
        found = [f"{path} has {', '.join(map(str, sorted(counts[name])))}" for name, path in paths.items()]
        raise UserError(f"no class count is in both: {'; '.join(found)}")
    for name, result in results.items():
        say(f"{name}  {describe(paths[name], result)}")
        only = sorted(counts[name] - {line["classes"] for line in lines})
        if only:
            say(f"   only in {name}, not compared: {' '.join(map(str, only))} classes")
    say(f"Mann-Whitney U, two-sided:\n{table(lines)}")


if __name__ == "__main__":
    run_script(main)
