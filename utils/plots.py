"""Figures of an evaluation and of the gate, drawn without pyplot, so without a display or state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.files import atomic_write

if TYPE_CHECKING:  # matplotlib takes most of a second to import and most runs draw nothing
    from matplotlib.figure import Figure

# Line style, marker and colour differ, so that curves stay apart in black and white.
CURVES = (
    ("test", "meta-test test (unseen images)", "o-", "tab:blue"),
    ("train", "meta-test train (forgetting)", "s--", "tab:orange"),
)


def accuracy_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against the number of classes learned, with bands of 95% intervals and chance.

    Args:
        rows: one mapping per class count, in any order, with `classes` (count) and `test`,
            `test_low`, `test_high`, `train`, `train_low`, `train_high` (mean and interval,
            0 to 1); other keys are ignored. Same axes as the paper's main figure.
    """
    rows = sorted(rows, key=lambda row: int(row["classes"]))
    classes = np.array([row["classes"] for row in rows], dtype=float)

    def percent(key: str) -> NDArray[np.float64]:
        return 100 * np.array([row[key] for row in rows], dtype=float)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style, colour in CURVES:
        axes.plot(classes, percent(key), style, color=colour, label=label)
        low, high = percent(f"{key}_low"), percent(f"{key}_high")
        axes.fill_between(classes, low, high, color=colour, alpha=0.2, linewidth=0)
        # A band has no width at a single point: bars show its interval too.
        axes.vlines(classes, low, high, color=colour, linewidth=1)
    counts = np.geomspace(classes[0], classes[-1], 100)
    axes.plot(counts, 100 / counts, "k:", label="chance")
    axes.set_xlabel("classes learned one after another")
    axes.set_ylabel("accuracy (%), 95% interval")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


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


def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure rendered: `[H, W, 3]`, 0 to 255."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi="figure")
    width, height = figure.canvas.get_width_height()
    pixels = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    return pixels.reshape(height, width, 4)[..., :3]


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
