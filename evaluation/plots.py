"""Figures of evaluations and trainings, which depend on no display and no settings of the user."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.results import METRICS
from model.scores import MEASURES, accuracies
from utils.files import atomic_write

if TYPE_CHECKING:  # matplotlib takes most of a second to import and most runs draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.targets import Target

# Line style, marker and brightness differ, so that curves and bars stay apart in black and white.
STYLES = (
    ("-", "o", "black"),
    ("--", "s", "tab:orange"),
    ("-.", "^", "tab:blue"),
    (":", "D", "tab:green"),
    ("-", "v", "0.6"),
    ("--", "P", "tab:purple"),
    ("-.", "X", "tab:brown"),
    (":", "*", "tab:pink"),
)
DPI = 150  # of PNG files
SMOOTHED = 50  # meta-steps, since that of one trajectory says little
PUBLISHED = ("o", "s", "^", "D", "v", "P", "X", "*")  # hollow, without a line
FILLS = (("0.65", ""), ("white", "///"), ("0.4", ""), ("white", "..."))  # colour and hatch of bars

Summary = Sequence[Mapping[str, Any]]
"""One mapping per class count, as `evaluation.results.summarise` returns them: `classes` (count) and mean and
95% interval, 0 to 1, of each accuracy: `test`, `test_low`, `test_high` and the like, None if unknown."""


@contextmanager
def default_style() -> Iterator[None]:
    """Within this context matplotlib has its own defaults, whatever files and variables of the user say."""
    os.environ["MPLBACKEND"] = "agg"  # read when matplotlib is imported; an unknown name would end that
    import matplotlib

    defaults = matplotlib.rcParamsDefault
    with matplotlib.rc_context({key: defaults[key] for key in defaults if not key.startswith("backend")}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@default_style()
def accuracy_figure(rows: Summary) -> Figure:
    """Accuracies of one treatment against the number of classes learned, and chance."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for style, name in zip(cycle(STYLES), accuracies()):
        _curve(axes, rows, name, MEASURES[name].title, style)
    _frame(axes, rows)
    axes.legend()
    return figure


@default_style()
def comparison_figure(
    curves: Mapping[str, Summary], targets: Sequence[Target] = (), against: str = "classes"
) -> Figure:
    """Accuracy of several treatments against the number of classes, or against the meta-steps that their
    models were trained for, a panel for each accuracy.

    Args:
        curves: by the name in the legend. targets: published accuracies, drawn as hollow markers with their
        spread. against: `classes`, or `step`, which the lines of the curves then have beside the entries of a
        summary.
    """
    sources = list(dict.fromkeys((target.treatment, target.source) for target in targets))
    all_rows = [row for rows in curves.values() for row in rows]
    columns, height = (3, 4.6 + 0.2 * -(-(len(curves) + len(sources) + 1) // 3))
    if against == "step":
        columns, height = 4, 4.6
    figure = new_figure(5.5 * len(accuracies()), height)
    panels = figure.subplots(1, len(accuracies()), sharex=True, sharey=True, squeeze=False)[0]
    legend: dict[str, Any] = {}
    for axes, name in zip(panels, accuracies(), strict=True):
        for style, (label, rows) in zip(cycle(STYLES), curves.items()):
            _curve(axes, rows, name, label, style, against)
        for marker, (treatment, source) in zip(cycle(PUBLISHED), sources):
            wanted = (name, treatment, source)
            points = [t for t in targets if (t.quantity, t.treatment, t.source) == wanted]
            if points:
                axes.errorbar(
                    [target.classes or 0 for target in points],
                    [target.published for target in points],
                    yerr=[np.nan if target.spread is None else target.spread for target in points],
                    fmt=marker,
                    color="black",
                    markerfacecolor="none",  # so that ours shows through
                    elinewidth=1,
                    markersize=9,
                    zorder=3,
                    label=f"{treatment}, published: {source}",
                )
        _frame(axes, all_rows, against)
        axes.set_title(MEASURES[name].title)
        axes.label_outer()
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            legend[str(label)] = handle
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=columns, fontsize=9)
    return figure


@default_style()
def training_figure(runs: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> Figure:
    """What trainings measured at each meta-step, as means over `SMOOTHED` steps: loss and accuracies.

    Args:
        runs: by the name in the legend, the columns that `evaluation.results.read_metrics` returns.
    """
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 2, sharex=True)
    for (line, _, colour), (label, columns) in zip(cycle(STYLES), runs.items()):
        width = min(SMOOTHED, len(columns["step"]))
        steps, loss, trajectory, remember = (
            np.convolve(columns[name], np.full(width, 1 / width), "valid") for name in METRICS
        )
        panels[0].plot(steps, loss, line, color=colour, label=label)
        panels[1].plot(steps, 100 * remember, line, color=colour, label=f"remember, {label}")
        panels[1].plot(steps, 100 * trajectory, ":", color=colour, label=f"trajectory, {label}")
    for axes, title in zip(panels, ("loss of the query images", "accuracy (%)"), strict=True):
        axes.set_title(title)
        axes.set_xlabel(f"meta-step (means over {SMOOTHED})")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


@default_style()
def bars_figure(final: Mapping[str, Mapping[str, Any]], targets: Sequence[tuple[str, Target]] = ()) -> Figure:
    """Accuracies of several treatments after the same number of classes, as bars.

    Args:
        final: by name, the line of its summary at that class count.
        targets: published accuracies at that class count, each with the name it belongs to.
    """
    (classes,) = {line["classes"] for line in final.values()}
    names, lines = list(final), list(final.values())
    figure = new_figure(7, 1.8 + 0.6 * len(names))
    axes = figure.add_subplot()
    step = 0.8 / len(accuracies())
    offsets = {name: (k - (len(accuracies()) - 1) / 2) * step for k, name in enumerate(accuracies())}
    for (colour, hatch), (name, offset) in zip(cycle(FILLS), offsets.items()):
        places = np.arange(len(names)) + offset
        mean, low, high = (_percent(lines, f"{name}{bound}") for bound in ("", "_low", "_high"))
        axes.barh(
            *(places, mean, 0.95 * step),
            color=colour,
            edgecolor="black",
            hatch=hatch,
            label=MEASURES[name].title,
        )
        axes.errorbar(mean, places, xerr=(mean - low, high - mean), fmt="none", ecolor="black", capsize=3)
        for place, value in zip(places, mean, strict=True):  # apart from the bars and what is on them
            text = "-" if np.isnan(value) else f"{value:.1f}"
            axes.text(110, place, text, ha="right", va="center", fontsize=9)
    if targets:
        axes.plot(
            [target.published for _, target in targets],
            [names.index(name) + offsets[target.quantity] for name, target in targets],
            "D",
            color="black",
            markerfacecolor="white",
            markersize=7,
            zorder=3,
            clip_on=False,
            label="published",
        )
    axes.axvline(100 / classes, color="black", linestyle=":", label="chance")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 111)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(_with_interval(f"accuracy after {classes} classes (%)", lines))
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _with_interval(label: str, rows: Summary) -> str:
    """The label of an axis, which names the interval where some row has one."""
    known = any(row.get(f"{name}_low") is not None for row in rows for name in accuracies())
    return f"{label}, 95% interval" if known else label


def _percent(rows: Summary, key: str) -> NDArray[np.float64]:
    """A column in percent; NaN, which is not drawn, for None."""
    return 100 * np.array([row.get(key) for row in rows], dtype=float)


def _curve(
    axes: Axes, rows: Summary, key: str, label: str, style: tuple[str, str, str], against: str = "classes"
) -> None:
    """One line of mean accuracies with the band of its intervals."""
    rows = sorted(rows, key=lambda row: int(row[against]))
    places = [row[against] for row in rows]
    line, marker, colour = style
    axes.plot(places, _percent(rows, key), line, marker=marker, color=colour, label=label)
    low, high = _percent(rows, f"{key}_low"), _percent(rows, f"{key}_high")
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    # A band has no width at a single point: bars show its interval too.
    axes.vlines(places, low, high, color=colour, linewidth=1)


def _frame(axes: Axes, rows: Summary, against: str = "classes") -> None:
    """The axes of the paper's main figure and, against classes, chance."""
    if against == "classes":
        classes = [row["classes"] for row in rows]
        counts = np.geomspace(min(classes), max(classes), 100)
        axes.plot(counts, 100 / counts, "k:", label="chance")
        axes.set_xlim(left=0)
    axes.set_xlabel("classes learned one after another" if against == "classes" else "meta-steps")
    axes.set_ylabel(_with_interval("accuracy (%)", rows))
    axes.set_ylim(0, 102)  # room for the upper half of a marker
    axes.grid(alpha=0.3)


@default_style()
def forgetting_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy on every class learned so far, over the course of one run: black is forgotten.

    Args:
        rows: of `evaluation.runs.by_class`, one moment after the other. A picture row is one moment, a column
            one class; the panels are the images trained on and unseen ones.
    """
    times = sorted({int(row["seen"]) for row in rows})
    accuracy = np.full((2, len(times), times[-1]), np.nan)
    for row in rows:
        accuracy[:, times.index(int(row["seen"])), int(row["position"])] = row["train"], row["test"]
    figure = new_figure(9, 5)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, values, name in zip(panels, accuracy, ("images trained on", "unseen images"), strict=True):
        # A time's row reaches down from the time before, so that the vertical axis is to scale.
        image = axes.pcolormesh(
            np.arange(times[-1] + 1), [0, *times], 100 * values, cmap="gray", vmin=0, vmax=100
        )
        axes.patch.set(facecolor="white", hatch="////", edgecolor="lightgray")
        axes.invert_yaxis()
        axes.set_ylabel("classes learned by then")
        axes.set_title(f"{name} (hatched: not learned yet)", fontsize="medium")
    panels[-1].set_xlabel("class, in the order of learning")
    figure.colorbar(image, ax=panels, label="accuracy (%)")
    return figure


@default_style()
def gate_figure(gates: NDArray[np.floating[Any]], labels: Sequence[int]) -> Figure:
    """The gate of several images as rows of grey values, black where a feature is shut off.

    Args:
        gates: [B, features], 0 to 1.
        labels: the class of each of the B images.
    """
    figure = new_figure(9, 0.8 + 0.25 * len(gates))
    axes = figure.add_subplot()
    image = axes.imshow(gates, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel("feature of the prediction network")
    axes.set_yticks(range(len(gates)), [str(label) for label in labels])
    axes.set_ylabel("class")
    figure.colorbar(image, label="gate")
    return figure


@default_style()
def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure rendered: [H, W, 3], 0 to 255."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def save_png(figure: Figure, path: Path) -> NDArray[np.uint8]:
    """Write the figure as PNG, whole or not at all; returns its pixels, which take longer than writing them.

    Raises:
        UserError: the file cannot be written.
    """
    figure.set_dpi(DPI)
    pixels = figure_pixels(figure)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", dpi=(DPI, DPI))
    return pixels


@default_style()
def save_pdf(figure: Figure, path: Path) -> None:
    """Write the figure as PDF, whole or not at all, without its date: the same file for the same figure.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="pdf", metadata={"CreationDate": None})
