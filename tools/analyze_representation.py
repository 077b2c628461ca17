"""Measure and draw a model's representation of unseen classes: sparsity, dead units, KNN, pictures.

    python -m tools.analyze_representation --model Neuromodulation_Model.net
    python -m tools.analyze_representation --model OML_Model.net        # a network without a gate
    python -m tools.analyze_representation --model M.net --dataset glyphs --test_classes 100   # no files

The weights do not change. A KNN classifier (k = 5, Euclidean) learns 15 images of each class. Activity and
KNN accuracy are measured on 5 other images of each class.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.images import ImageSet, Pool
from datasets.task_sampler import Task, sample_task
from evaluation import plots
from flags import common
from model.check import Use
from model.fast import choose_backend
from model.modelfactory import restore
from model.outer_loop import gather
from model.representation import NEIGHBOURS, measure, principal_components, represent
from tools.ledger import REPRESENTATION
from utils.command_line import parse, recorded
from utils.distributed import choose_device, refuse_several
from utils.errors import UserError, run_script
from utils.files import load_checkpoint, write_text
from utils.run import Run, log_to_terminal

log = logging.getLogger("anml")

SHOWN = 6  # images whose activations are drawn, from classes spread over the data
ALPHABETS, CLASSES_SHOWN = 5, 6  # alphabets in the embedding, classes of each: more would overlap


class Analysis(common.SplitFlags, common.DataFlags, common.RunFlags):
    __doc__ = (__doc__ or "").partition("The weights")[0]

    model: Annotated[Path, "model file to analyse"] = Path("Neuromodulation_Model.net")
    classes: Annotated[Literal["evaluation", "background"], "of meta-test or meta-training"] = "evaluation"
    name: common.Name = "representation"
    seed: common.Seed = 222


def pictures(seen: Mapping[str, Pool], task: Task, images: ImageSet) -> dict[str, plots.Figure]:
    """All figures of what `represent` gives, by the stems of their file names."""
    names, gate = images.classes, seen.get("gate")
    alphabets = [name.partition("/")[0] for name in names]
    titles = ("before the gate", "gate", "after the gate") if gate else ("features",)
    rows = dict(zip(titles, seen.values(), strict=True))
    shown = task.test[torch.linspace(0, len(names) - 1, min(SHOWN, len(names))).long(), 0]
    figures = {
        "activations": activations_figure(
            gather(Pool(images.images, images.sizes), shown)[0].movedim(1, -1).numpy(),
            {title: gather(part, shown)[0].cpu().numpy() for title, part in rows.items()},
            [names[label] for label in shown[:, 0].tolist()],
        )
    }
    if gate is not None:
        means = torch.stack([gate[label].mean(0) for label in range(len(names))])
        figures["class_gates"] = plots.gate_figure(means.cpu().numpy(), alphabets)
    groups = [list(group) for _, group in groupby(range(len(names)), alphabets.__getitem__)]
    chosen = [label for group in groups[:ALPHABETS] for label in group[:CLASSES_SHOWN]]
    features = {title: part for title, part in rows.items() if part is not gate}
    points = {title: torch.cat([part[label] for label in chosen]) for title, part in features.items()}
    figures["embedding"] = embedding_figure(
        {title: principal_components(part).numpy() for title, part in points.items()},
        [alphabets[label] for label in chosen for _ in range(images.sizes[label])],
    )
    return figures


@plots.default_style()
def activations_figure(
    images: NDArray[np.uint8], rows: Mapping[str, NDArray[np.floating[Any]]], names: Sequence[str]
) -> plots.Figure:
    """A figure of images above their activations as square maps (the paper's figure of sparsity).

    Args:
        images: `[B, S, S, C]`, 0 to 255, with one channel or three.
        rows: `[B, F]` activations, 0 or more, by title. The colour scale of the row `gate` ends at 1, of any
            other row at its largest value.
        names: of the classes of the B images, `Alphabet/character01`.
    """
    figure = plots.new_figure(1.5 * len(names), 1.6 * (1 + len(rows)))
    panels = figure.subplots(1 + len(rows), len(names), squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for axes, image, name in zip(panels[0], images, names, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name.replace("/", "\n"), fontsize=7)
    for line, (title, activations) in zip(panels[1:], rows.items(), strict=True):
        # The smallest square that holds all features (2304 are 48 x 48), filled up with NaN.
        side = math.isqrt(activations.shape[1] - 1) + 1
        missing = (0, 0), (0, side**2 - activations.shape[1])
        squares = np.pad(activations, missing, constant_values=np.nan).reshape(-1, side, side)
        top = 1.0 if title == "gate" else float(activations.max()) or 1.0
        for axes, square in zip(line, squares, strict=True):
            picture = axes.imshow(square, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        line[0].set_ylabel(title)
        figure.colorbar(picture, ax=list(line), shrink=0.8)
    return figure


@plots.default_style()
def embedding_figure(
    panels: Mapping[str, NDArray[np.floating[Any]]], alphabets: Sequence[str]
) -> plots.Figure:
    """A figure of images as points in a plane, coloured and marked by alphabet.

    Args:
        panels: `[N, 2]` coordinates by title.
        alphabets: of the N images.
    """
    figure = plots.new_figure(5.2 * len(panels), 5.4)
    names = np.array(alphabets)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        for (_, marker, colour), name in zip(cycle(plots.STYLES), dict.fromkeys(alphabets)):
            x, y = points[names == name].T
            axes.scatter(x, y, s=14, marker=marker, color=colour, alpha=0.7, linewidth=0, label=name)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(title=title, xlabel="first principal component", ylabel="second principal component")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def main() -> None:
    args = parse(Analysis)
    log_to_terminal()
    refuse_several("analysis")
    plots.load_matplotlib()
    device = choose_device(args.device, args.threads)
    saved = load_checkpoint(args.model)
    log.info("%s: %s after %d meta-steps", args.model, saved.network, saved.step)
    net, step = restore(saved, args.model), saved.step
    images = args.source(net).load(args.classes, net.normalisation)
    backend = choose_backend(args.backend, [net], device, Use(channels=images.channels)).name
    images = images.limited(args.test_classes, "--test_classes")
    learned, tested = args.train_images, args.test_images
    images.require(learned + tested, f"--train_images {learned} and --test_images {tested}", tested)
    if len(images) * learned < NEIGHBOURS:
        raise UserError(f"{len(images)} classes of --train_images {learned} have no {NEIGHBOURS} neighbours")
    task = sample_task(
        *(images.sizes, len(images), torch.Generator().manual_seed(args.seed)),
        train_images=learned,
        test_images=tested,
        class_order="dataset",
        split=args.split,
        test_only=images.test_only,
    )
    about = {"device": str(device), "backend": backend, "network": net.network, "step": step}
    about |= {"classes": len(images), **images.about()}
    with Run.open(args.runs_dir, args.name, None, args, about) as run:
        log.info("run folder %s, device %s", run.folder, device)
        representation = represent(net.to(device), images.pool(device))
        measured = measure(representation, task)
        run.scalars(step, {f"representation/{key}": value for key, value in measured.items()})
        content = {**about, "arguments": recorded(args), "measured": measured}
        write_text(run.folder / "representation.json", json.dumps(content, indent=2) + "\n")
        with plots.or_warn("the representation"):
            for name, figure in pictures(representation, task, images).items():
                run.image(f"representation/{name}", plots.save_png(figure, run.folder / f"{name}.png"), step)
        without = "" if net.has_gate else " before the gate"
        for key, value in measured.items():
            log.info("%5.1f %%  %s", 100 * value, REPRESENTATION[key].removesuffix(without))
        log.info("representation.json and the pictures are in %s", run.folder)


if __name__ == "__main__":
    run_script(main)
