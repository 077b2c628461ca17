"""Test whether two evaluations differ: Mann-Whitney U at each class count, as in the paper.

python -m tools.compare_results runs/anml_0 runs/oml_0
python -m tools.compare_results results/anml.csv runs/Omni_test_traj_3/results.json
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from evaluation.results import Row, aligned, intervals, read_results, shown, summarise
from model.scores import accuracies
from utils.command_line import parse
from utils.errors import UserError, load_library, run_script, say
from utils.flag import Flags

RESULTS = "run folder of an evaluation, or its results.csv or results.json"


def table(a: Sequence[Row], b: Sequence[Row], counts: Sequence[int]) -> str:
    """The comparison as a table for the terminal, at class counts of both results: for each accuracy the
    means in percent with their intervals, U of `a` and the two-sided p.

    U is the number of pairs of runs in which `a` is better; ties count half. The test is the paper's, and
    assumes that all runs of all models are independent.
    """
    stats = load_library("scipy.stats")  # a second to import
    keys = [key for key in accuracies() if all(row[key] is not None for row in (*a, *b))]
    headings = [text for key in keys for text in (f"A {key} %", f"B {key} %", "U", "p")]
    lines = [["classes", "runs", *headings]]
    for classes in counts:
        both = [[row for row in rows if row["classes"] == classes] for rows in (a, b)]
        line = [str(classes), "/".join(str(len(rows)) for rows in both)]
        summaries = [summarise(rows)[0] for rows in both]
        for key in keys:
            values = [[row[key] for row in rows] for rows in both]
            found = stats.mannwhitneyu(*values, alternative="two-sided")
            line += [*(shown(summary, key) for summary in summaries), f"{found.statistic:g}"]
            line.append(f"{found.pvalue:.2g}")
        lines.append(line)
    notes = zip("AB", (intervals(summarise(rows)) for rows in (a, b)), strict=True)
    return aligned(lines) + "".join(f"\n{side}  ± {text}" for side, texts in notes for text in texts)


class Comparison(Flags):
    __doc__ = __doc__

    a: Annotated[Path, RESULTS]
    b: Annotated[Path, RESULTS]


def main() -> None:
    args = parse(Comparison)
    a, b = read_results(args.a), read_results(args.b)
    treatments = [results.about.get("treatment", "treatment not recorded") for results in (a, b)]
    described = f"A  {args.a}: {treatments[0]}\nB  {args.b}: {treatments[1]}"
    common = {row["classes"] for row in a.rows} & {row["classes"] for row in b.rows}
    if not common:
        raise UserError(f"no class count is in both: {described}")
    say(f"{described}\nMann-Whitney U, two-sided:\n{table(a.rows, b.rows, sorted(common))}")


if __name__ == "__main__":
    run_script(main)
