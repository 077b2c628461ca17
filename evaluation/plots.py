"""Figures of evaluations and of representations, drawn without pyplot, so without a display or state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.results import METRICS
from model.scores import Measure, accuracies
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
LABELS = 60  # names along an axis, beyond which none is readable
SMOOTHED = 50  # meta-steps, since that of one trajectory says little
PUBLISHED = ("o", "s", "^", "D", "v", "P", "X", "*")  # hollow, without a line
FILLS = (("0.65", ""), ("white", "///"), ("0.4", ""), ("white", "..."))  # colour and hatch of bars

Summary = Sequence[Mapping[str, Any]]
"""One mapping per class count, as `evaluation.results.summarise` returns them: `classes` (count) and mean and
95% interval, 0 to 1, of each accuracy: `test`, `test_low`, `test_high` and the like, None if unknown."""


def accuracy_figure(rows: Summary) -> Figure:
    """Accuracies of one treatment against the number of classes learned, and chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for style, measure in zip(cycle(STYLES), _measured(rows)):
        _curve(axes, rows, measure.name, measure.title, style)
    _against_classes(axes, [rows])
    axes.legend()
    return figure


def comparison_figure(curves: Mapping[str, Summary], targets: Sequence[Target] = ()) -> Figure:
    """Accuracy of several treatments against the number of classes, a panel for each accuracy.

    Args:
        curves: by the name in the legend.
        targets: published accuracies, drawn as hollow markers with their spread.
    """
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys((target.treatment, target.source) for target in targets))
    entries = len(curves) + len(sources) + 1
    measures = _measured([row for rows in curves.values() for row in rows])
    figure = Figure(figsize=(5.5 * len(measures), 4.6 + 0.2 * -(-entries // 3)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharex=True, sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for style, (label, rows) in zip(cycle(STYLES), curves.items()):
            _curve(axes, rows, measure.name, label, style)
        for marker, (treatment, source) in zip(cycle(PUBLISHED), sources):
            wanted = (measure.name, treatment, source)
            points = [t for t in targets if (t.quantity, t.treatment, t.source) == wanted]
            if points:
                _published(axes, points, marker, f"{treatment}, published: {source}")
        _against_classes(axes, list(curves.values()))
        axes.set_title(measure.title)
        axes.label_outer()
    by_label = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def training_figure(runs: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> Figure:
    """What trainings measured at each meta-step, as means over `SMOOTHED` steps: loss and accuracies.

    Args:
        runs: by the name in the legend, the columns that `evaluation.results.read_metrics` returns.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
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


def steps_figure(curves: Mapping[str, Summary]) -> Figure:
    """Accuracy against the meta-steps that models were trained for, a panel for each accuracy.

    Args:
        curves: by the name in the legend; their lines have `step` beside the entries of a summary.
    """
    from matplotlib.figure import Figure

    measures = _measured([row for rows in curves.values() for row in rows])
    figure = Figure(figsize=(5.5 * len(measures), 4.6), layout="constrained")
    panels = figure.subplots(1, len(measures), sharex=True, sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for style, (label, rows) in zip(cycle(STYLES), curves.items()):
            _curve(axes, rows, measure.name, label, style, against="step")
        axes.set_xlabel("meta-steps")
        axes.set_ylim(0, 102)  # room for the upper half of a marker
        axes.grid(alpha=0.3)
        axes.set_title(measure.title)
    panels[0].set_ylabel(_with_interval("accuracy (%)", [row for rows in curves.values() for row in rows]))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def bars_figure(final: Mapping[str, Mapping[str, Any]], targets: Sequence[tuple[str, Target]] = ()) -> Figure:
    """Accuracies of several treatments after the same number of classes, as bars.

    Args:
        final: by name, the line of its summary at that class count.
        targets: published accuracies at that class count, each with the name it belongs to.
    """
    from matplotlib.figure import Figure

    (classes,) = {line["classes"] for line in final.values()}
    names = list(final)
    figure = Figure(figsize=(7, 1.8 + 0.6 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    lines = list(final.values())
    measures = _measured(lines)
    step = 0.8 / len(measures)
    offsets = {measure.name: (k - (len(measures) - 1) / 2) * step for k, measure in enumerate(measures)}
    for (colour, hatch), measure in zip(cycle(FILLS), measures):
        places = np.arange(len(names)) + offsets[measure.name]
        mean, low, high = (_percent(lines, f"{measure.name}{bound}") for bound in ("", "_low", "_high"))
        axes.barh(
            places, mean, 0.95 * step, color=colour, edgecolor="black", hatch=hatch, label=measure.title
        )
        axes.errorbar(mean, places, xerr=(mean - low, high - mean), fmt="none", ecolor="black", capsize=3)
        for place, value in zip(places, mean, strict=True):  # apart from the bars and what is on them
            text = "-" if np.isnan(value) else f"{value:.1f}"
            axes.text(110, place, text, ha="right", va="center", fontsize=9)
    points = [(name, target) for name, target in targets if target.quantity in offsets]
    if points:
        axes.plot(
            [target.published for _, target in points],
            [names.index(name) + offsets[target.quantity] for name, target in points],
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


def _measured(rows: Summary) -> list[Measure]:
    """The accuracies that `rows` have; all where they have none, so that there is something to draw on."""
    return [m for m in accuracies() if any(row.get(m.name) is not None for row in rows)] or accuracies()


def _with_interval(label: str, rows: Summary) -> str:
    """The label of an axis: one run has no interval to be shown."""
    known = any(row.get(f"{measure.name}_low") is not None for row in rows for measure in accuracies())
    return f"{label}, 95% interval" if known else label


def _percent(rows: Summary, key: str) -> NDArray[np.float64]:
    """NaN for what is not known, which is not drawn."""
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


def _published(axes: Axes, targets: Sequence[Target], marker: str, label: str) -> None:
    """Hollow markers at published accuracies, with their spread where there is one."""
    axes.errorbar(
        [target.classes or 0 for target in targets],
        [target.published for target in targets],
        yerr=[np.nan if target.spread is None else target.spread for target in targets],
        fmt=marker,
        color="black",
        markerfacecolor="none",  # so that ours shows through
        elinewidth=1,
        markersize=9,
        zorder=3,
        label=label,
    )


def _against_classes(axes: Axes, curves: Sequence[Summary]) -> None:
    """Chance, and the axes of the paper's main figure."""
    classes = [row["classes"] for rows in curves for row in rows]
    counts = np.geomspace(min(classes), max(classes), 100)
    axes.plot(counts, 100 / counts, "k:", label="chance")
    axes.set_xlabel("classes learned one after another")
    axes.set_ylabel(_with_interval("accuracy (%)", [row for rows in curves for row in rows]))
    axes.set_xlim(left=0)
    axes.set_ylim(0, 102)  # room for the upper half of a marker
    axes.grid(alpha=0.3)


def forgetting_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy on every class learned so far, over the course of one run: black is forgotten.

    Args:
        rows: mappings with `seen` (classes learned by then), `position` (of a class, in the order of
            learning), and `train` and `test` (accuracy on its images, 0 to 1). A picture row is one
            time, a column one class; the panels are the images trained on and unseen ones.
    """
    times = sorted({int(row["seen"]) for row in rows})
    accuracy = np.full((2, len(times), times[-1]), np.nan)
    for row in rows:
        accuracy[:, times.index(int(row["seen"])), int(row["position"])] = row["train"], row["test"]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
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


def gate_figure(gates: NDArray[np.floating[Any]], labels: Sequence[int]) -> Figure:
    """The gate of several images as rows of grey values, black where a feature is shut off.

    Args:
        gates: `[B, features]`, 0 to 1.
        labels: the class of each of the B images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.25 * len(gates)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(gates, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel("feature of the prediction network")
    axes.set_yticks(range(len(gates)), [str(label) for label in labels])
    axes.set_ylabel("class")
    figure.colorbar(image, label="gate")
    return figure


def activations_figure(
    images: NDArray[np.uint8],
    rows: Mapping[str, NDArray[np.floating[Any]]],
    names: Sequence[str],
) -> Figure:
    """Sample images above their activations, each as a square map (the paper's figure of sparsity).

    Args:
        images: `[B, 28, 28, C]`, 0 to 255, of one channel or three.
        rows: by title, `[B, F]` activations, 0 or more. The row `gate` goes from 0 to 1, any other to its
            largest value.
        names: of the classes of the B images, `Alphabet/character01`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(names), 1.6 * (1 + len(rows))), layout="constrained")
    panels = figure.subplots(1 + len(rows), len(names), squeeze=False)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, image, name in zip(panels[0], images, names, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name.replace("/", "\n"), fontsize=7)
    for line, (title, activations) in zip(panels[1:], rows.items(), strict=True):
        top = 1.0 if title == "gate" else float(activations.max()) or 1.0
        for axes, values in zip(line, activations, strict=True):
            picture = axes.imshow(_square(values), cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        line[0].set_ylabel(title)
        figure.colorbar(picture, ax=list(line), shrink=0.8)
    return figure


def _square(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """`[F]` as the smallest square that holds them; 2304 features are 48 x 48. The rest is NaN."""
    side = int(np.ceil(np.sqrt(len(values))))
    padded = np.full(side * side, np.nan)
    padded[: len(values)] = values
    return padded.reshape(side, side)


def class_gates_figure(gates: NDArray[np.floating[Any]], alphabets: Sequence[str]) -> Figure:
    """The mean gate of every class, a row each, the rows of an alphabet together.

    Args:
        gates: `[C, F]`, 0 to 1, classes sorted by alphabet. Units are shown from the most open one to the
            most shut one.
        alphabets: of the C classes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(-gates.mean(0), kind="stable")
    # Trained gates are nearly shut: a scale up to 1, or to one open unit, would show black.
    top = float(np.percentile(gates, 99.5)) or 1.0
    image = axes.imshow(
        gates[:, order], cmap="magma", vmin=0, vmax=top, aspect="auto", interpolation="antialiased"
    )
    names = list(dict.fromkeys(alphabets))
    starts = [list(alphabets).index(name) for name in names]
    middles = np.add(starts, [*starts[1:], len(alphabets)]) / 2 - 0.5
    if len(names) <= LABELS:
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=0.6)
        axes.set_yticks(middles, names, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("unit of the gate, from the most open to the most shut")
    axes.set_ylabel("classes")
    figure.colorbar(image, label="mean gate of the class", extend="max")
    return figure


def embedding_figure(panels: Mapping[str, NDArray[np.floating[Any]]], alphabets: Sequence[str]) -> Figure:
    """Images as points in a plane, coloured and marked by alphabet.

    Args:
        panels: by title, `[N, 2]` coordinates.
        alphabets: of the N images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    names = np.array(alphabets)
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(places, panels.items(), strict=True):
        for (_, marker, colour), name in zip(cycle(STYLES), dict.fromkeys(alphabets)):
            x, y = points[names == name].T
            axes.scatter(x, y, s=14, marker=marker, color=colour, alpha=0.7, linewidth=0, label=name)
        axes.set_title(title)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second principal component")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure rendered: `[H, W, 3]`, 0 to 255."""
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


def save_pdf(figure: Figure, path: Path) -> None:
    """Write the figure as PDF, whole or not at all, without its date: the same file for the same figure.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="pdf", metadata={"CreationDate": None})
