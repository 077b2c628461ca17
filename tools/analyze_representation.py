"""Look at what a model makes of classes it has never seen: sparsity, dead units, KNN, pictures.

    python -m tools.analyze_representation --model Neuromodulation_Model.net
    python -m tools.analyze_representation --model OML_Model.net        # without a gate: what exists of it
    python -m tools.analyze_representation --model M.net --dataset glyphs --test_classes 100   # no data

Nothing is learned but a KNN classifier (k = 5, Euclidean) on 15 images of each class; activity and
KNN accuracy are those of 5 others. Of classes with equal votes the one with the nearest image wins.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datasets import ImageSet, Pool, load_images
from evaluation.plots import (
    activations_figure,
    class_gates_figure,
    embedding_figure,
    save_png,
)
from evaluation.targets import REPRESENTATION, read_targets
from flags.common import DataFlags, RunFlags, SplitFlags, name_flag, seed_flag, test_classes_flag
from model.episodes import Task, sample_task
from model.fast.guard import Use, choose_backend
from model.meta_learner import gather
from model.modelfactory import Network, restore_model
from model.representation import NEIGHBOURS, Representation, measure, principal_components, represent
from utils.checkpoint import load_checkpoint
from utils.command_line import file_path, flag, parse, recorded, whole
from utils.device import choose_device
from utils.distributed import refuse_several
from utils.errors import UserError, run_script
from utils.files import write_text
from utils.run import Run, log_to_terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("anml")

CLASSES_SHOWN = 6  # of each alphabet in the embedding: more would hide each other


@dataclass(kw_only=True)
class AnalysisFlags(SplitFlags):
    """What is looked at."""

    group = "analysis"

    model: Path = flag(
        None,
        file_path,
        "model file that mrcl_classification.py or pretrain_classification.py wrote",
        shown="none: it must be given",
        metavar="FILE",
    )
    test_classes: int | None = test_classes_flag("meta-test classes to look at")
    samples: int = flag(6, whole(1, 20), "images whose activations are drawn, of different classes")
    alphabets: int = flag(5, whole(1), "alphabets in the picture of the embedding, the first of the data")


@dataclass(kw_only=True)
class AnalysisRunFlags(RunFlags):
    """Where the analysis is recorded."""

    name: str = name_flag("representation")
    seed: int = seed_flag(222)


@dataclass(kw_only=True)
class Analysis(AnalysisFlags, DataFlags, AnalysisRunFlags):
    """Measure and draw a model's features and gate on classes it has never seen.

    python -m tools.analyze_representation --model Neuromodulation_Model.net
    """

    def check(self) -> None:
        self.notice_other_data()
        if "model" not in self.given:
            raise UserError("give --model FILE, which mrcl_classification.py writes")


def network(args: Analysis) -> tuple[Network, int]:
    """The network of `--model`, and the meta-steps it has seen."""
    saved = load_checkpoint(args.model)
    log.info("%s: %s after %d meta-steps", args.model, saved.network, saved.step)
    return restore_model(saved, args.model), saved.step


def table(measured: dict[str, float], gated: bool, published: bool) -> str:
    """The quantities as lines for the terminal, in percent; `published`: beside the paper's of ANML."""
    paper = {target.quantity: str(target) for target in read_targets()} if published and gated else {}
    lines = [f"{'%':<32}  {'here':>6}" + f"  {'paper':>6}" * published]
    for key, value in measured.items():
        name = REPRESENTATION[key] if gated else REPRESENTATION[key].removesuffix(" before the gate")
        lines.append(f"{name:<32}  {100 * value:6.1f}" + f"  {paper.get(key, '-'):>6}" * published)
    return "\n".join(lines)


def pictures(
    args: Analysis, representation: Representation, task: Task, images: ImageSet
) -> dict[str, Figure]:
    """All figures by name."""
    names = images.classes
    alphabets = [name.partition("/")[0] for name in names]
    before, gate, after = representation.before, representation.gate, representation.after
    if gate is None:
        features = rows = {"features": before}
    else:
        features = {"before the gate": before, "after the gate": after}
        rows = {"before the gate": before, "gate": gate, "after the gate": after}
    figures = {}

    # A test image each of classes spread over the data.
    spread = torch.linspace(0, len(names) - 1, min(args.samples, len(names))).long()
    shown = task.test[spread, 0]
    figures["activations"] = activations_figure(
        gather(Pool(images.images, images.sizes), shown)[0].movedim(1, -1).numpy(),
        {title: gather(part, shown)[0].cpu().numpy() for title, part in rows.items()},
        [names[label] for label in shown[:, 0].tolist()],
    )

    if gate is not None:
        means = torch.stack([gate[label].mean(0) for label in range(len(names))])
        figures["class_gates"] = class_gates_figure(means.cpu().numpy(), alphabets)

    chosen = [
        label
        for alphabet in list(dict.fromkeys(alphabets))[: args.alphabets]
        for label in [k for k, other in enumerate(alphabets) if other == alphabet][:CLASSES_SHOWN]
    ]
    points = {title: torch.cat([part[label] for label in chosen]) for title, part in features.items()}
    figures["embedding"] = embedding_figure(
        {title: principal_components(part).numpy() for title, part in points.items()},
        [alphabets[label] for label in chosen for _ in range(images.sizes[label])],
    )
    return figures


def main() -> None:
    args = parse(Analysis)
    log_to_terminal()
    refuse_several("analysis")
    device = choose_device(args.device, args.threads)
    net, step = network(args)
    backend, _ = choose_backend(args.backend, [net], device, Use(net))
    images = load_images(args.source(), "evaluation", net.normalisation)
    images = images.limited(args.test_classes, "--test_classes")
    args.test_classes = len(images)
    images.require(
        args.train_images + args.test_images,
        f"--train_images {args.train_images} and --test_images {args.test_images}",
    )
    if len(images) * args.train_images < NEIGHBOURS:
        raise UserError(
            f"{len(images)} classes of --train_images {args.train_images} have no {NEIGHBOURS} neighbours"
        )
    task = sample_task(
        images.sizes,
        len(images),
        torch.Generator().manual_seed(args.seed),
        train_images=args.train_images,
        test_images=args.test_images,
        class_order="dataset",
        split=args.split,
    )
    about: dict[str, Any] = {"device": str(device), "backend": backend, "network": net.network, "step": step}
    about |= images.about()
    with Run.open(args.runs_dir, args.name, None, args, about) as run:
        log.info("run folder %s, device %s", run.folder, device)
        representation = represent(net.to(device), images.pool(device))
        measured = measure(representation, task)
        run.metrics(measured)
        run.scalars(step, {f"representation/{key}": value for key, value in measured.items()})
        content = {**about, "arguments": recorded(args), "measured": measured}
        write_text(run.folder / "representation.json", json.dumps(content, indent=2) + "\n")
        for name, figure in pictures(args, representation, task, images).items():
            run.image(f"representation/{name}", save_png(figure, run.folder / f"{name}.png"), step)
        log.info("%s", table(measured, representation.gate is not None, args.dataset == "omniglot"))
        log.info("representation.json and the pictures are in %s", run.folder)


if __name__ == "__main__":
    run_script(main)
