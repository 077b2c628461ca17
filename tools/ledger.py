"""The ledger: what was published beside what we measured, as tables in docs/results.md.

    python -m tools.ledger            # write them into docs/results.md
    python -m tools.ledger --check    # exit 1 if docs/results.md does not say what results/ holds

`results/` holds the targets (see `evaluation/targets.py`), our results as `<result>.csv`, the `results.csv`
of an evaluation (its `results.json` may lie beside it as `<result>.json`), or as `<result>.json` alone, the
`representation.json` of an analysis, and `manifest.csv`, which says how each was made. What has no result is
listed as not run; a result of a name that no target has stands in a table of its own.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.results import FEW, read_json, read_results, read_table, summarise, text_of
from evaluation.targets import ACCURACIES, QUANTITIES, REPRESENTATION, Target, read_targets
from utils.command_line import parse
from utils.errors import UserError, run_script, say, try_to_write
from utils.files import write_text
from utils.flag import Flags, switch

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- ledger: `python -m tools.ledger` writes what is between these two lines -->"
END = "<!-- end of the ledger -->"


class Measured(NamedTuple):
    """One of our numbers in percent (NaN where every run diverged), how far from it its 95% interval reaches
    where there is one, and how many of its runs diverged."""

    mean: float
    reach: float | None = None
    diverged: int = 0

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "diverged"
        text = f"{self.mean:.1f}"
        if self.reach is not None:  # never 0.0 for what is not 0
            text += f" ± {self.reach:.1f}" if self.reach >= 0.05 else f" ± {self.reach:.1g}"
        return f"{text} ({self.diverged} diverged)" if self.diverged else text

    def difference(self, target: Target) -> str:
        """How far it is from a published number, in bold where it misses the number."""
        text = "-" if math.isnan(self.mean) else f"{self.mean - target.published:+.1f}"
        return text if target.met_by(self.mean) else f"**{text}**"


Result = dict[tuple[str, int | None], Measured]
"""What one result says, by quantity and class count (None for a representation)."""


def read_accuracies(path: Path) -> Result:
    """The accuracies of an evaluation's `results.csv`; raises UserError where the file is none."""
    return {
        (key, line["classes"]): _measured(line, key)
        for line in summarise(read_results(path).rows)
        for key in ACCURACIES
    }


def _measured(line: Mapping[str, Any], key: str) -> Measured:
    mean, low, high = (line[f"{key}{end}"] for end in ("", "_low", "_high"))
    if mean is None:
        return Measured(math.nan)
    # An interval ends at 0 and at 100.
    reach = None if low is None else 100 * max(mean - low, high - mean)
    return Measured(100 * mean, reach, line["diverged"])


def read_representation(path: Path) -> Result:
    """The quantities in a `representation.json`; raises UserError where the file is none."""
    measured = read_json(path).get("measured")
    if not isinstance(measured, dict):
        measured = {"measured": None}
    for quantity, value in measured.items():
        if quantity not in REPRESENTATION or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(
                f"{path} is not a representation.json of tools.analyze_representation: {quantity} = {value!r}"
            )
    return {(key, None): Measured(100 * value) for key, value in measured.items()}


def our_results(folder: Path) -> tuple[dict[str, Result], list[dict[str, str]]]:
    """All results in `folder` by name, and the rows of its manifest.

    Raises:
        UserError: a file is malformed, or is not in the manifest, or the other way round.
    """
    manifest = read_table(folder / "manifest.csv", ("result", "training", "command"))
    listed = [row["result"] for row in manifest]
    if len(listed) != len(set(listed)) or any("|" in cell for row in manifest for cell in row.values()):
        raise UserError(f"{folder / 'manifest.csv'}: a result listed twice, or a | that breaks the table")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):  # a .csv before the .json beside it, which says more of it
        if path.suffix in (".csv", ".json") and path.name not in ("targets.csv", "manifest.csv"):
            files.setdefault(path.stem, path)
    for name in sorted(set(listed) ^ set(files)):
        where = "has no line in manifest.csv" if name in files else "is in manifest.csv but has no file"
        raise UserError(f"{folder}: the result {name!r} {where}")
    read = {".csv": read_accuracies, ".json": read_representation}
    return {name: read[path.suffix](path) for name, path in files.items()}, manifest


def markdown(headings: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; `headings` are separated by commas."""
    names = headings.split(", ")
    lines = [f"| {' | '.join(cells)} |" for cells in (names, *rows)]
    return [lines[0], "|" + "---|" * len(names), *lines[1:]]


def ledger(folder: Path) -> str:
    """The tables of docs/results.md, from the files in `folder`.

    Raises:
        UserError: a file is malformed.
    """
    targets = read_targets(folder / "targets.csv")
    results, manifest = our_results(folder)
    pairs = [
        (target, results.get(target.result, {}).get((target.quantity, target.classes))) for target in targets
    ]
    outcomes = [None if ours is None else target.met_by(ours.mean) for target, ours in pairs]
    training = {row["result"]: row["training"] for row in manifest}  # beside each number: it may be short
    lines = [
        f"{len(targets)} published numbers: {outcomes.count(True)} met, {outcomes.count(False)} missed "
        f"(difference in bold), {outcomes.count(None)} not run. All in percent; ± of ours is how far from it "
        "a 95% interval over runs (of several models, over these) reaches: Student's t for fewer than "
        f"{FEW} of them, else the bootstrap. Tolerances are in `results/targets.csv`: twice the published "
        "spread and at least 2 points, 3 or more without one. Second-hand: cited by others, not checked "
        "against the paper's text.",
        "",
        *markdown(
            "treatment, quantity, classes, published, source, ours, difference, training, command",
            [_row(list(group), training) for _, group in groupby(pairs, key=_together)],
        ),
    ]
    known = {target.result for target in targets}
    beside = [row for name in results if name not in known for row in _without_target(name, results[name])]
    if beside:
        lines += ["", "Ours without a published number:", ""]
        lines += markdown("result, quantity, classes, ours", beside)
    if manifest:
        made = [(row["result"], row["training"], f"`{row['command']}`") for row in manifest]
        lines += ["", *markdown("result, training, made by", made)]
    return "\n".join(lines)


def _together(pair: tuple[Target, Measured | None]) -> tuple[str, ...]:
    """What the class counts of one row of the table share."""
    return (*pair[0][:3], pair[0].source)


def _row(pairs: Sequence[tuple[Target, Measured | None]], training: Mapping[str, str]) -> list[str]:
    first, _ = pairs[0]
    counts = " / ".join(str(target.classes or "") for target, _ in pairs)
    published = " / ".join(str(target) for target, _ in pairs)
    ours, differences = "not run", ""
    if any(measured for _, measured in pairs):
        ours = " / ".join(str(measured or "-") for _, measured in pairs)
        differences = " / ".join(m.difference(target) if m else "-" for target, m in pairs)
    cells = [first.treatment, QUANTITIES[first.quantity], counts, published, first.source, ours, differences]
    return [*cells, training.get(first.result, ""), f"`configs/paper.sh {first.result}`"]


def _without_target(name: str, result: Result) -> list[list[str]]:
    rows = []
    for quantity in dict.fromkeys(key for key, _ in result):
        found = {classes: value for (key, classes), value in result.items() if key == quantity}
        counts = " / ".join(str(classes or "") for classes in found)
        rows.append([name, QUANTITIES[quantity], counts, " / ".join(map(str, found.values()))])
    return rows


def inserted(text: str, tables: str, source: Path) -> str:
    """`text` with `tables` between the two marker lines.

    Raises:
        UserError: the markers are not there once each, in order.
    """
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    if (text.count(START), text.count(END), rest.count(END)) != (1, 1, 1):
        raise UserError(f"{source} must hold these two lines once each: {START} and {END}")
    return f"{before}{START}\n\n{tables}\n\n{END}{after}"


class Ledger(Flags):
    """Write published numbers beside ours into docs/results.md.

    python -m tools.ledger
    """

    check: bool = switch(False, "change nothing; exit code 1 if the page is not what would be written")


def main() -> None:
    args = parse(Ledger)
    page = ROOT / "docs/results.md"
    text = text_of(page)
    current = inserted(text, ledger(ROOT / "results"), page)
    if not args.check:
        write_text(page, current)
        say(f"{page} says what results/ holds")
    elif text != current:
        try_to_write(f"{page} and results/ disagree: run python -m tools.ledger\n", sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
