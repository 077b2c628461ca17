"""Figures of evaluations and trainings; they need no display and ignore the user's matplotlib settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.scores import MEASURES, TENTHS, accuracies
from utils.errors import UserError, load_library, reason
from utils.files import atomic_write

if TYPE_CHECKING:  # matplotlib takes most of a second to import, and most runs draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure

log = logging.getLogger("anml")

# Line style, marker and brightness differ, so that curves and bars stay apart in black and white.
LINES, MARKERS = ("-", "--", "-.", ":"), "os^DvPX*"
COLOURS = ("black", "tab:orange", "tab:blue", "tab:green", "0.6", "tab:purple", "tab:brown", "tab:pink")
STYLES = tuple(zip(cycle(LINES), MARKERS, COLOURS))
HOLLOW = tuple(("none", marker, "black") for marker in MARKERS)  # styles of published numbers
LABELS = 60  # names along an axis; more would be unreadable
DPI = 150  # dots per inch of PNG files
ENDS = ("", "_low", "_high")  # of the keys of a mean and of the ends of its interval
CLASSES = "classes learned one after another"

Line = Mapping[str, Any]
"""A line of `evaluation.results.summarise`: `classes` (count), and mean and 95% interval of each accuracy,
0 to 1 or None: `test`, `test_low`, `test_high` and so on."""


def load_matplotlib() -> None:
    """Import matplotlib, or raise UserError."""
    os.environ["MPLBACKEND"] = "agg"  # read when matplotlib is imported; an unknown name would end that
    load_library("matplotlib.figure")


@contextmanager
def or_warn(what: str) -> Iterator[None]:
    """A block whose errors become a warning that `what` is not drawn; a UserError (a full disk) is raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # matplotlib's faults are of many kinds
        log.warning("%s is not drawn: %s", what, reason(error))


@contextmanager
def default_style() -> Iterator[None]:
    """Within this context matplotlib has its own defaults, whatever the user's are, and reads no formulas."""
    load_matplotlib()
    with load_library("matplotlib.style").context(["default", {"text.parse_math": False}]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width and height in inches, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@default_style()
def comparison_figure(
    curves: Mapping[str, Sequence[Line]], published: Mapping[str, Sequence[Line]] | None = None
) -> Figure:
    """A figure with a panel for each accuracy, against the number of classes, or against the models'
    meta-steps where lines have a `step`.

    Args:
        curves: lines by the name in the legend.
        published: published lines by the name in the legend, drawn as hollow markers.
    """
    everything = [line for rows in curves.values() for line in rows]
    against = "step" if "step" in everything[0] else "classes"
    drawn = [*zip(curves.items(), cycle(STYLES)), *zip((published or {}).items(), cycle(HOLLOW))]
    figure = new_figure(5.5 * len(accuracies()), 4.6 + 0.2 * -(-(len(drawn) + 1) // 3))
    panels = figure.subplots(1, len(accuracies()), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, accuracies(), strict=True):
        for (label, lines), style in drawn:
            rows = sorted(lines, key=lambda row: int(row[against]))
            _curve(axes, [row[against] for row in rows], rows, name, label, style)
        if against == "classes":
            classes = [line["classes"] for line in everything]
            counts = np.geomspace(min(classes), max(classes), 100)
            axes.plot(counts, 100 / counts, "k:", label="chance")
            axes.set_xlim(left=0)
        xlabel = CLASSES if against == "classes" else "meta-steps"
        axes.set(title=MEASURES[name].title, xlabel=xlabel, ylabel=with_interval("accuracy (%)", everything))
        axes.set_ylim(0, 102)  # room for the upper half of a marker
        axes.grid(alpha=0.3)
        axes.label_outer()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _curve(
    axes: Axes, x: Sequence[float], rows: Sequence[Line], key: str, label: str, look: tuple[str, str, str]
) -> None:
    """Draw a column of rows in percent, with its intervals, in one of `STYLES` or `HOLLOW`."""
    style, marker, colour = look
    mean, low, high = (percent(rows, f"{key}{end}") for end in ENDS)
    fill, size = ("none", 9) if style == "none" else (colour, 6)  # so that our marker shows through
    axes.plot(x, mean, ls=style, marker=marker, color=colour, mfc=fill, ms=size, label=label)
    # Bars show the interval of a single point as well, where a band has no width.
    axes.vlines(x, low, high, color=colour, linewidth=1)
    if style != "none":
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def with_interval(label: str, rows: Sequence[Line]) -> str:
    """The label of an axis; where a row has an interval, the label says what the interval is over."""
    methods = {row[key] for row in rows for key in row if key.endswith("_interval")} - {None}
    over = sorted({method.rpartition(" ")[2] for method in methods})
    return f"{label}, 95% interval over {' or '.join(over)}" if over else label


def percent(rows: Sequence[Line], key: str) -> NDArray[np.float64]:
    """A column in percent; None becomes NaN, which is not drawn."""
    return 100 * np.array([row.get(key) for row in rows], dtype=float)


@default_style()
def forgetting_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """A figure of the accuracy on every class learned so far, over the course of one run; black is 0.

    Args:
        rows: of `evaluation.runs.by_class`, in the order of time. A picture row is one moment, a column one
            class; one panel is of training images, the other of unseen images.
    """
    times = sorted({int(row["seen"]) for row in rows})
    accuracy = np.full((2, len(times), times[-1]), np.nan)
    for row in rows:
        accuracy[:, times.index(int(row["seen"])), int(row["position"])] = row["train"], row["test"]
    figure = new_figure(9, 5)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, values, name in zip(panels, accuracy, ("images trained on", "unseen images"), strict=True):
        # A picture row begins at the moment before, so that the vertical axis is to scale.
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
def order_figure(curves: Mapping[str, Sequence[Line]]) -> Figure:
    """A figure of what happens to classes: a panel of test accuracy by tenth of the order of learning, with
    the last lines of a single curve or the last line of each of several, and a panel of volatility.
    """
    figure = new_figure(11, 4.8)
    order, change = figure.subplots(1, 2)
    styles = cycle(STYLES)
    for (label, lines), style in zip(curves.items(), cycle(STYLES)):
        for line in lines[-len(STYLES) if len(curves) == 1 else -1 :]:
            points = [{end: line.get(f"{name}{end}") for end in ENDS} for name in TENTHS]
            _curve(order, range(1, 11), points, "", f"{label}, {line['classes']} classes", next(styles))
        _curve(change, [line["classes"] for line in lines], lines, "volatility", label, style)
    order.set(title=f"meta-test test ({MEASURES['test'].meaning})", xticks=range(1, 11))
    order.set_xlabel("tenth of the classes, in the order of learning")
    change.set(title="volatility (change of a class since the stop before)", xlabel=CLASSES)
    order.set_ylabel(with_interval("accuracy (%)", [line for lines in curves.values() for line in lines]))
    for axes in (order, change):
        axes.set_ylim(0, 102 if axes is order else None)
        axes.grid(alpha=0.3)
    figure.legend(*order.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


@default_style()
def gate_figure(gates: NDArray[np.floating[Any]], labels: Sequence[object]) -> Figure:
    """A figure of gates, a row each; units go from the most open to the most shut.

    Args:
        gates: [B, features], 0 to 1.
        labels: of the B rows. Neighbouring rows with the same label share one label at their middle.
    """
    figure = new_figure(9, min(7, 0.8 + 0.25 * len(gates)))
    axes = figure.add_subplot()
    order = np.argsort(-gates.mean(0), kind="stable")
    # Trained gates are nearly shut: on a scale up to 1, or up to one open unit, all would be black.
    top = float(np.percentile(gates, 99.5)) or 1.0
    image = axes.imshow(
        gates[:, order], "magma", vmin=0, vmax=top, aspect="auto", interpolation="antialiased"
    )
    groups = [(str(label), len(list(group))) for label, group in groupby(labels)]
    if len(groups) <= LABELS:
        names, sizes = zip(*groups, strict=True)
        ends = np.cumsum(sizes)
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="white", linewidth=0.6)
        axes.set_yticks(ends - np.array(sizes) / 2 - 0.5, names, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="unit of the gate, from the most open to the most shut", ylabel="classes")
    figure.colorbar(image, label="gate", extend="max")
    return figure


@default_style()
def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure rendered: [H, W, 3], 0 to 255."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def read_png(path: Path) -> NDArray[np.uint8]:
    """The pixels of a PNG file that :func:`save_png` wrote."""
    with Image.open(path) as picture:
        return np.array(picture, np.uint8)


def save_png(figure: Figure, path: Path) -> NDArray[np.uint8]:
    """Write the figure as PNG, whole or not at all, or raise UserError; returns the pixels [H, W, 3]."""
    figure.set_dpi(DPI)
    pixels = figure_pixels(figure)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", dpi=(DPI, DPI))
    return pixels
