"""Write the ledger: published numbers beside our results, as tables in docs/results.md.

    python -m tools.ledger            # write the tables into docs/results.md
    python -m tools.ledger --check    # exit 1 if the tables in docs/results.md are out of date

`results/` holds the published numbers (`targets.csv`, see :class:`Target`), `manifest.csv` with the training
and command of each result, and our results. A result is `<result>.csv`, the `results.csv` of an evaluation
(with its `results.json` as `<result>.json`), or `<result>.json` alone, the `representation.json` of an
analysis. A target without a result is listed as not run; results without a target have their own table.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from evaluation.results import read_results, read_table, shown, summarise
from model.scores import accuracies, optional
from utils.command_line import parse
from utils.errors import UserError, run_script, say, try_to_write
from utils.files import read_json, read_text, write_text
from utils.flag import Flags, Reader, number, whole

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ROOT / "results/targets.csv"
START = "<!-- ledger: `python -m tools.ledger` writes what is between these two lines -->"
END = "<!-- end of the ledger -->"

ACCURACIES = {name: f"{name} accuracy" for name in accuracies()}
REPRESENTATION = {
    "active_before": "active units before the gate",
    "active_after": "active units after the gate",
    "gate_mean": "mean gate",
    "dead": "dead units",
    "knn_before": "KNN on features before the gate",
    "knn_gate": "KNN on the gate",
    "knn_after": "KNN on features after the gate",
}
QUANTITIES = ACCURACIES | {"volatility": "volatility"} | REPRESENTATION
"""Names of quantities for people, by their names in files. All are fractions, shown in percent."""

NUMBERS = {"classes", "published", "ours", "difference"}  # columns that differ between class counts


class Target(NamedTuple):
    """One published number in percent: a row of `results/targets.csv`.

    Tolerances are in percentage points: twice the published spread and at least 2; without a spread 3, and 5
    for quantities of representations unless the number itself is small. Where the weights behind a number are
    published, the tolerance is 1.2, since both numbers are means over draws of one model.

    Attributes:
        result: name of our result in `results/`, and of the step of `configs/paper.sh` that makes the result.
        treatment: the treatment's name for people.
        quantity: key of `QUANTITIES`.
        classes: the class count of an accuracy; None for quantities of a representation.
        published: the number, after `<` for an upper limit and `~` for an approximate number.
        spread: as published; None if none was.
        tolerance: allowed difference of our result, in points.
        source: the publication.
    """

    result: str
    treatment: str
    quantity: str
    classes: int | None
    published: str
    spread: float | None
    tolerance: float
    source: str

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:g}"
        return self.published.replace("~", "about ") + spread  # Markdown strikes out text between two ~

    @property
    def percent(self) -> float:
        """The number without `<` and `~`."""
        return float(self.published.lstrip("<~"))

    def met_by(self, percent: float) -> bool:
        """Whether `percent` is within the tolerance, or below an upper limit plus the tolerance."""
        if self.published.startswith("<"):
            return percent < self.percent + self.tolerance
        return abs(percent - self.percent) <= self.tolerance


def _published(text: str) -> str:
    number(0, 100)(text.removeprefix("<").removeprefix("~"))
    return text


COLUMNS: dict[str, Reader] = {
    **dict.fromkeys(Target._fields, str),
    "quantity": dict(zip(QUANTITIES, QUANTITIES, strict=True)).__getitem__,
    "classes": optional(whole(1)),
    "published": _published,
    "spread": optional(number(0, 100)),
    "tolerance": number(0, 100),
}


def read_targets(path: Path = TARGETS) -> list[Target]:
    """All published numbers, in the order of the file; raises UserError where the file is malformed."""
    rows = read_table(path, COLUMNS, key=("result", "quantity", "classes", "source"))
    return [Target(**row) for row in rows]


def read_result(path: Path) -> Sequence[Mapping[str, Any]]:
    """The summary of an evaluation's `results.csv`, one line per class count, or of an analysis's
    `representation.json`, one line without a class count; raises UserError for other files."""
    if path.suffix == ".csv":
        return summarise(read_results(path).rows)
    measured = read_json(path).get("measured")
    measured = measured if isinstance(measured, dict) else {"measured": measured}
    for key, value in measured.items():
        if key not in REPRESENTATION or not isinstance(value, int | float) or not 0 <= value <= 1:
            made_by = "a representation.json of tools.analyze_representation"
            raise UserError(f"{path} is not {made_by}: {key} = {value!r}")
    return [{"classes": None, **measured}]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows of equal keys. Neighbours that differ only in `NUMBERS` share a line."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    for _, group in groupby(rows, lambda row: [row[key] for key in row if key not in NUMBERS]):
        alike = list(group)
        cells = {key: " / ".join(row[key] for row in alike) for key in NUMBERS & rows[0].keys()}
        if all(row.get("ours") == "-" for row in alike):
            cells |= {"ours": "not run", "difference": ""}
        texts = [cell.replace("|", "\\|") for cell in {**alike[0], **cells}.values()]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def ledger(folder: Path) -> str:
    """The tables of docs/results.md, from the files in `folder`; raises UserError if a file is malformed, or
    if the manifest lists other results than the folder holds."""
    targets = read_targets(folder / "targets.csv")
    columns = dict.fromkeys(("result", "training", "command"), str)
    manifest = read_table(folder / "manifest.csv", columns, key=["result"])
    paths = [*folder.glob("*.json"), *folder.glob("*.csv")]  # a .csv in place of the .json beside it
    files = {path.stem: path for path in paths if path.name not in ("targets.csv", "manifest.csv")}
    made = {row.pop("result"): {**row, "command": f"`{row['command']}`"} for row in manifest}
    for name in sorted(made.keys() ^ files.keys()):
        where = "has no line in manifest.csv" if name in files else "is in manifest.csv but has no file"
        raise UserError(f"{folder}: the result {name!r} {where}")
    results = {name: read_result(path) for name, path in files.items()}
    compared, outcomes = [], []
    for target in targets:
        key = target.quantity
        found = [line for line in results.get(target.result, ()) if line["classes"] == target.classes]
        line = next((line for line in found if key in line), {})
        percent = 100 * (math.nan if line.get(key) is None else line[key])
        difference = "-" if math.isnan(percent) else f"{percent - target.percent:+.1f}"
        outcomes.append(target.met_by(percent) if line else None)
        row = {
            "treatment": target.treatment,
            "quantity": QUANTITIES[key],
            "classes": str(target.classes or ""),
        }
        row |= {"published": str(target), "source": target.source, "ours": shown(line, key) if line else "-"}
        row |= {"difference": f"**{difference}**" if outcomes[-1] is False else difference}
        not_run = {"training": "", "command": f"`configs/paper.sh {target.result}`"}
        compared.append(row | made.get(target.result, not_run))
    others = [
        {"result": name, "quantity": text, "classes": str(line["classes"] or ""), "ours": shown(line, key)}
        | made[name]
        for name in sorted(results.keys() - {target.result for target in targets})
        for key, text in QUANTITIES.items()
        for line in results[name]
        if key in line
    ]
    parts = [
        f"{len(targets)} published numbers: {outcomes.count(True)} met, {outcomes.count(False)} missed "
        f"(difference in bold), {outcomes.count(None)} not run."
    ]
    parts += [markdown(compared)] if compared else []
    parts += ["Ours without a published number:", markdown(others)] if others else []
    return "\n\n".join(parts)


def inserted(text: str, tables: str, source: Path) -> str:
    """`text` with `tables` between the two marker lines; raises UserError unless each marker occurs once, in
    order."""
    parts = re.split(f"({re.escape(START)}|{re.escape(END)})", text)
    if parts[1::2] != [START, END]:
        raise UserError(f"{source} must hold these two lines once each: {START} and {END}")
    parts[2] = f"\n\n{tables}\n\n"
    return "".join(parts)


class Ledger(Flags):
    __doc__ = (__doc__ or "").partition("`results/`")[0]

    check: Annotated[bool, "change nothing; exit code 1 if the page is not what would be written"] = False


def main() -> None:
    args = parse(Ledger)
    page = ROOT / "docs/results.md"
    text = read_text(page)
    current = inserted(text, ledger(ROOT / "results"), page)
    if not args.check:
        write_text(page, current)
        say(f"{page} says what results/ holds")
    elif text != current:
        try_to_write(f"{page} and results/ disagree: run python -m tools.ledger\n", sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
