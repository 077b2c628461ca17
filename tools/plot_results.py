"""Draw results of evaluations beside each other and beside published numbers.

    python -m tools.plot_results runs/Omni_test_traj_0
    python -m tools.plot_results ANML=runs/anml_0 OML=runs/oml_0/results.csv --out figures --name main
    python -m tools.plot_results runs/on_the_way_0 --against steps      # of an evaluation of several models
    python -m tools.plot_results runs/mrcl_omniglot_0 --against training

Each figure is a PNG and a PDF. `<name>_curves` has accuracy against the number of classes, `<name>_bars` the
accuracy at the largest class count that all results have. Of results that have them, `<name>_order` has
accuracy by tenth of the order of learning, and volatility. `--against` draws one other figure in place of
these: `<name>_steps` or `<name>_training`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from evaluation import plots
from evaluation.plots import Line, percent
from evaluation.results import METRICS, Results, read_metrics, read_results, summarise
from model.scores import MEASURES, TENTHS, accuracies
from tools.ledger import ACCURACIES, read_targets
from utils.command_line import parse
from utils.errors import UserError, run_script, say
from utils.files import atomic_write
from utils.flag import Flags, file_path, folder_name

SMOOTHED = 50  # meta-steps of a moving average, since single trajectories are noisy
FILLS = (("0.65", ""), ("white", "///"), ("0.4", ""), ("white", "..."))  # colour and hatch of bars


@plots.default_style()
def training_figure(runs: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> plots.Figure:
    """A figure of loss and accuracies of trainings at each meta-step, as means over `SMOOTHED` steps.

    Args:
        runs: the columns of `evaluation.results.read_metrics` by the name in the legend.
    """
    figure = plots.new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, sharex=True)
    for (line, _, colour), (label, columns) in zip(cycle(plots.STYLES), runs.items()):
        width = min(SMOOTHED, len(columns["step"]))
        means = (sliding_window_view(columns[name], width).mean(1) for name in METRICS)
        steps, loss, trajectory, remember = means
        left.plot(steps, loss, line, color=colour, label=label)
        right.plot(steps, 100 * remember, line, color=colour, label=f"remember, {label}")
        right.plot(steps, 100 * trajectory, ":", color=colour, label=f"trajectory, {label}")
    for axes, title in ((left, "loss of the query images"), (right, "accuracy (%)")):
        axes.set(title=title, xlabel=f"meta-step (means over {SMOOTHED})", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


@plots.default_style()
def bars_figure(final: Mapping[str, Line], published: Sequence[tuple[str, Line]] = ()) -> plots.Figure:
    """A figure of the accuracies of several treatments after the same number of classes, as bars.

    Args:
        final: the line of each summary at that class count, by name.
        published: names of `final`, each with a published line at that class count.
    """
    (classes,) = {line["classes"] for line in final.values()}
    names, lines = list(final), list(final.values())
    rows = np.array([names.index(name) for name, _ in published])
    figure = plots.new_figure(7, 2.2 + 0.6 * len(names))
    axes = figure.add_subplot()
    step = 0.8 / len(accuracies())
    for k, ((colour, hatch), name) in enumerate(zip(cycle(FILLS), accuracies())):
        offset = (k - (len(accuracies()) - 1) / 2) * step
        y = np.arange(len(names)) + offset
        mean, low, high = (percent(lines, f"{name}{bound}") for bound in ("", "_low", "_high"))
        style: dict[str, Any] = {"color": colour, "edgecolor": "black", "hatch": hatch, "capsize": 3}
        reach = np.maximum(0, (mean - low, high - mean))  # of equal values, rounding may be below 0
        bars = axes.barh(y, mean, 0.95 * step, xerr=reach, label=MEASURES[name].title, **style)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)  # beyond the bars and their intervals
        label = "published" if published and k == 0 else None
        shown = percent([line for _, line in published], name)
        axes.plot(shown, rows + offset, "kD", mfc="white", zorder=3, clip_on=False, label=label)
    axes.axvline(100 / classes, color="black", linestyle=":", label="chance")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 111), xticks=range(0, 101, 20))
    axes.set_xlabel(plots.with_interval(f"accuracy after {classes} classes (%)", lines))
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def labelled(texts: list[str]) -> dict[str, Path]:
    """The path of each `label=path`, by label; the label of a path alone is its folder or file.

    Raises:
        UserError: a label is empty, used twice or special to matplotlib.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        label, equals, rest = text.partition("=")
        path = file_path(text)
        if equals and not path.exists():
            path = file_path(rest)
        else:
            place = path.resolve().parent if path.stem in ("results", "metrics") else path.resolve()
            label = place.name if place.is_dir() else place.stem
        if not label.strip() or label.startswith("_") or label in paths:
            raise UserError(f"{text!r}: no label, one that begins with _, or one that is taken")
        paths[label] = path
    return paths


def published(results: dict[str, Results], most: int) -> tuple[dict[str, str], dict[str, list[Line]]]:
    """The treatment of each label with published numbers, and published lines of these treatments (else of
    ANML) at up to `most` classes, by the name in the legend.

    A label that names a treatment takes precedence over the treatment that the results record, since the
    latter does not say how a model was trained.
    """
    targets = [target for target in read_targets() if target.quantity in ACCURACIES]
    known = {target.treatment.lower(): target.treatment for target in targets}
    treatments: dict[str, str] = {}
    for label, result in results.items():
        for name in (label, str(result.about.get("treatment"))):
            if name.lower() in known:
                treatments.setdefault(label, known[name.lower()])
    lines: dict[str, list[Line]] = {}
    for target in targets:
        if target.treatment in (set(treatments.values()) or {"ANML"}) and (target.classes or 0) <= most:
            mean, spread = target.percent / 100, (target.spread or math.nan) / 100
            line = {"treatment": target.treatment, "classes": target.classes, target.quantity: mean}
            line |= {f"{target.quantity}_low": mean - spread, f"{target.quantity}_high": mean + spread}
            lines.setdefault(f"{target.treatment}, published: {target.source}", []).append(line)
    return treatments, lines


def on_the_way(results: dict[str, Results]) -> dict[str, list[Line]]:
    """A curve for each class count of each label: lines of a summary with their models' meta-steps as `step`;
    raises UserError where results do not record these steps."""
    curves: dict[str, list[Line]] = {}
    for label, result in results.items():
        try:
            steps = {str(model["name"]): int(model["step"]) for model in result.about["models"]}
            step_of = [steps[row["model"]] for row in result.rows]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{label} does not say how many steps its models were trained for") from None
        for step in sorted(set(step_of)):
            for line in summarise([row for row in result.rows if steps[row["model"]] == step]):
                name = f"{line['classes']} classes" if len(results) == 1 else f"{label}, {line['classes']}"
                curves.setdefault(name, []).append({"step": step, **line})
    return curves


class Plot(Flags):
    __doc__ = (__doc__ or "").partition("Each")[0]

    results: Annotated[
        list[str],
        "run folders of evaluations, with --against training of trainings, or their results.csv or "
        "metrics.csv; LABEL names one in the figures",
    ]
    against: Annotated[
        str,
        "classes: accuracy against the number of classes learned; steps: against the meta-steps of an "
        "evaluation's models, a curve for each class count; training: loss and accuracy at each meta-step",
        ("classes", "steps", "training"),
    ] = "classes"
    published: Annotated[
        bool, "published numbers beside results on Omniglot: of the treatments that these name, else of ANML"
    ] = True
    out: Annotated[Path, "folder for the figures"] = Path("runs/figures")
    name: Annotated[str, "start of the figures' file names", folder_name] = "results"


def figures(args: Plot) -> dict[str, plots.Figure]:
    """The figures of `--against`, by the ends of their file names."""
    paths = labelled(args.results)
    if args.against == "training":
        return {"training": training_figure({label: read_metrics(path) for label, path in paths.items()})}
    results = {label: read_results(path) for label, path in paths.items()}
    if args.against == "steps":
        return {"steps": plots.comparison_figure(on_the_way(results))}
    summaries = {label: summarise(result.rows) for label, result in results.items()}
    counts = [{line["classes"] for line in lines} for lines in summaries.values()]
    if not (common := set.intersection(*counts)):
        raise UserError(f"{', '.join(results)} have no class count in common: there are no bars to draw")
    longest = max(common)
    final = {label: line for label in summaries for line in summaries[label] if line["classes"] == longest}
    is_omniglot = all(str(r.about.get("data", "omniglot")).startswith("omniglot") for r in results.values())
    # Published numbers at more classes than our results would squeeze the curves.
    end = max(set.union(*counts))
    treatments, known = published(results, end) if args.published and is_omniglot else ({}, {})
    beside = [
        (label, line)
        for label, treatment in treatments.items()
        for line in chain(*known.values())
        if (line["treatment"], line["classes"]) == (treatment, longest)
    ]
    drawn = {"curves": plots.comparison_figure(summaries, known), "bars": bars_figure(final, beside)}
    ordered = {label: lines for label, lines in summaries.items() if TENTHS[0] in lines[-1]}
    return drawn | ({"order": plots.order_figure(ordered)} if ordered else {})


def main() -> None:
    args = parse(Plot)
    for name, figure in figures(args).items():
        png, pdf = (args.out / f"{args.name}_{name}.{suffix}" for suffix in ("png", "pdf"))
        plots.save_png(figure, png)
        with plots.default_style(), atomic_write(pdf) as file:
            # Without a date, so that the same figure gives the same file.
            figure.savefig(file, format="pdf", metadata={"CreationDate": None})
        say(f"{png}\n{pdf}")


if __name__ == "__main__":
    run_script(main)
