"""Draw results of evaluations beside each other and beside what was published.

    python -m tools.plot_results runs/Omni_test_traj_0
    python -m tools.plot_results ANML=runs/anml_0 OML=runs/oml_0/results.csv --out figures --name main
    python -m tools.plot_results runs/on_the_way_0 --against steps      # of an evaluation of several models
    python -m tools.plot_results runs/mrcl_omniglot_0 --against training

Two figures, each as PNG and PDF: `<name>_curves`, accuracy against the number of classes, and
`<name>_bars`, the accuracy at the largest class count that all results have. Against meta-steps one,
`<name>_steps`, and of what trainings measured on the way one, `<name>_training`.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from evaluation.plots import bars_figure, comparison_figure, save_pdf, save_png, training_figure
from evaluation.results import Results, read_metrics, read_results, summarise
from evaluation.targets import ACCURACIES, Target, read_targets
from utils.command_line import parse
from utils.errors import UserError, run_script, say
from utils.flag import Flags, choice, file_path, flag, folder_name, switch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Found = TypeVar("Found")


def labelled(text: str) -> tuple[str, Path]:
    """A label and a path from `label=path`; a path alone is named after its run folder or file."""
    label, equals, rest = text.partition("=")
    if equals and not file_path(text).exists():
        if not label.strip() or not rest:
            raise UserError(f"{text!r} is neither a path nor LABEL=PATH")
        return label, file_path(rest)
    path = file_path(text)
    return path.resolve().parent.name if path.stem in ("results", "metrics") else path.resolve().stem, path


def read_all(texts: list[str], read: Callable[[Path], Found]) -> dict[str, Found]:
    """What `read` finds, by label.

    Raises:
        UserError: nothing to read there, or two of the same label.
    """
    results: dict[str, Found] = {}
    for text in texts:
        label, path = labelled(text)
        if label.startswith("_") or "$" in label:  # which mean something else to matplotlib
            raise UserError(f"the label {label!r} begins with _ or holds $: give another one, LABEL=PATH")
        if label in results:
            raise UserError(f"two results are called {label!r}: give one another LABEL=PATH")
        results[label] = read(path)
    return results


def published(results: dict[str, Results]) -> tuple[dict[str, str], list[Target]]:
    """The treatment of each label that something is published of, and what is; ANML's if nothing is.

    A label that names a treatment counts more than what the results say they are, which does not
    tell how a model was trained.
    """
    accuracies = [target for target in read_targets() if target.quantity in ACCURACIES]
    known = {target.treatment.lower(): target.treatment for target in accuracies}
    treatments: dict[str, str] = {}
    for label, result in results.items():
        for name in (label, str(result.about.get("treatment"))):
            if name.lower() in known:
                treatments.setdefault(label, known[name.lower()])
    shown = set(treatments.values()) or {"ANML"}
    return treatments, [target for target in accuracies if target.treatment in shown]


def on_the_way(results: dict[str, Results]) -> dict[str, list[dict[str, Any]]]:
    """A curve for each class count of each label: lines of a summary with the `step` of their models.

    Raises:
        UserError: results that do not say for how many steps their models were trained.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for label, result in results.items():
        try:
            steps = {str(model["name"]): int(model["step"]) for model in result.about["models"]}
            rows = [(steps[row["model"]], row) for row in result.rows]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{label} does not say how many steps its models were trained for") from None
        for step in sorted({step for step, _ in rows}):
            for line in summarise([row for of, row in rows if of == step]):
                name = f"{line['classes']} classes" if len(results) == 1 else f"{label}, {line['classes']}"
                curves.setdefault(name, []).append({"step": step, **line})
    return curves


class Plot(Flags):
    """Draw accuracy against the number of classes, and the final accuracy as bars.

    python -m tools.plot_results ANML=runs/a_0 OML=runs/b_0
    """

    results: list[str] = flag(
        MISSING,
        str,
        "run folders of evaluate_classification.py, for --against training of mrcl_classification.py, "
        "or their results.csv or metrics.csv; LABEL names one in the figures",
        nargs="+",
        metavar="[LABEL=]RESULTS",
    )
    against: Literal["classes", "steps", "training"] = choice(
        "classes",
        ("classes", "steps", "training"),
        "what accuracy is drawn against: the number of classes learned; the meta-steps that the models of an "
        "evaluation (its --model A.net B.net ...) were trained for, a curve per class count; or, of run "
        "folders of mrcl_classification.py, what these measured at each step of the training",
    )
    published: bool = switch(
        True,
        "add published numbers to results on Omniglot, of the treatments that labels or results name, else "
        "of ANML",
    )
    out: Path = flag(Path("runs/figures"), file_path, "folder for the figures", metavar="DIR")
    name: str = flag("results", folder_name, "start of the figures' file names")


def figures(args: Plot) -> dict[str, Figure]:
    """The figures of `--against` by the end of their file's name."""
    if args.against == "training":
        return {"training": training_figure(read_all(args.results, read_metrics))}
    results = read_all(args.results, read_results)
    if args.against == "steps":
        return {"steps": comparison_figure(on_the_way(results), against="step")}
    summaries = {label: summarise(result.rows) for label, result in results.items()}
    common = set.intersection(*({line["classes"] for line in lines} for lines in summaries.values()))
    if not common:
        raise UserError(f"{', '.join(results)} have no class count in common: there are no bars to draw")
    longest = max(common)
    final = {
        label: next(line for line in lines if line["classes"] == longest)
        for label, lines in summaries.items()
    }
    of_omniglot = all(str(r.about.get("data", "omniglot")).startswith("omniglot") for r in results.values())
    treatments, targets = published(results) if args.published and of_omniglot else ({}, [])
    # Published numbers at more classes than ours would only squeeze the curves.
    end = max(line["classes"] for lines in summaries.values() for line in lines)
    targets = [target for target in targets if target.classes is not None and target.classes <= end]
    beside = [
        (label, target)
        for label, treatment in treatments.items()
        for target in targets
        if (target.classes, target.treatment) == (longest, treatment)
    ]
    return {"curves": comparison_figure(summaries, targets), "bars": bars_figure(final, beside)}


def main() -> None:
    args = parse(Plot)
    for name, figure in figures(args).items():
        png, pdf = (args.out / f"{args.name}_{name}.{suffix}" for suffix in ("png", "pdf"))
        save_png(figure, png)
        save_pdf(figure, pdf)
        say(f"{png}\n{pdf}")


if __name__ == "__main__":
    run_script(main)
