"""Meta-train ANML (or OML) on Omniglot.

    python mrcl_classification.py --rln 7 --meta_lr 0.001 --update_lr 0.1 --name mrcl_omniglot \
        --steps 20000 --seed 9 --model_name "Neuromodulation_Model.net"
    python mrcl_classification.py --config configs/anml_first_order.toml     # as released
    python mrcl_classification.py --dataset glyphs --steps 100               # without any data

Each step draws a class, learns its 20 images one by one, and improves the weights it started from so
that afterwards these images and 64 others of all classes are classified right.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import torch

from datasets import load_pool
from datasets.samplers import sample_trajectory
from model.meta_learner import MetaLearner, active_fraction, gather
from model.meta_test import MetaTest
from model.modelfactory import Network, build, restore
from utils.arguments import network_widths, parse, recorded, training_parser
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.device import choose_device
from utils.errors import UserError, run_script
from utils.files import check_writable
from utils.interrupt import Interrupt
from utils.plots import gate_figure
from utils.run import Run, log_to_terminal

log = logging.getLogger("anml")

VALIDATION_LR = 0.001  # of the small meta-tests on the way: the best rate at most lengths


def initial_network(args: argparse.Namespace) -> Network:
    """The network to train: new, or the one in `--saved_model`."""
    if not args.checkpoint:
        return build(args.treatment, network_widths(args), torch.Generator().manual_seed(args.seed))
    saved = load_checkpoint(args.saved_model)
    if saved.network != args.treatment:
        raise UserError(f"{args.saved_model} holds {saved.network}: add --treatment {saved.network}")
    return restore(saved.network, saved.widths, saved.state_dict, str(args.saved_model))


def validate(run: Run, net: Network, images: torch.Tensor, step: int, classes: int) -> None:
    """A small meta-test on meta-training classes, and the gates of some images, to TensorBoard."""
    meta_test = MetaTest(net, images, net.rln_meta_test, seed=0)
    score = meta_test.score(classes, VALIDATION_LR, "validation", draw=0)
    run.scalars(
        step,
        {"meta_val/accuracy_test": score.test, "meta_val/accuracy_train": score.train},
    )
    log.info(
        "step %d meta-test on %d meta-training classes: test %.3f train %.3f",
        *(step, classes, score.test, score.train),
    )
    labels = torch.arange(min(classes, 10)).repeat_interleave(2)
    shown = images[: min(classes, 10), :2].flatten(0, 1)
    with torch.no_grad():
        _, gate = net.features(net.lower(shown, 0))
    if gate is not None:
        run.figure("meta_val/gate", gate_figure(gate.cpu().numpy(), labels.tolist()), step)


def gate_statistics(net: Network, images: torch.Tensor) -> dict[str, float]:
    """Mean of the gate and fraction of features that are active before and after it."""
    with torch.no_grad():
        features, gate = net.features(net.lower(images, 0))
    if gate is None:
        return {"meta_train/active": active_fraction(features)}
    return {
        "meta_train/gate_mean": gate.mean().item(),
        "meta_train/active_before_gate": active_fraction(features),
        "meta_train/active_after_gate": active_fraction(features * gate),
    }


def train(
    args: argparse.Namespace, run: Run, net: Network, images: torch.Tensor, interrupt: Interrupt
) -> int:
    """Meta-train `net` for `--steps` steps or until Ctrl-C; returns the number of steps done."""
    generator = torch.Generator().manual_seed(args.seed)
    learner = MetaLearner(
        net,
        images,
        generator,
        meta_lr=args.meta_lr,
        update_lr=args.update_lr,
        rln=args.rln,
        first_order=args.first_order,
        reset=args.reset,
    )
    with run.progress(args.steps, every=args.log_every) as progress:
        for step in range(1, args.steps + 1):
            start = time.perf_counter()
            trajectory = sample_trajectory(
                len(images),
                images.shape[1],
                generator,
                update_step=args.update_step,
                tasks=args.tasks,
                remember=args.remember,
            )
            result = learner.step(trajectory)
            values = {
                "loss": result.loss.item(),
                "accuracy_trajectory": result.accuracy_trajectory.item(),
                "accuracy_remember": result.accuracy_remember.item(),
            }
            run.metrics({"step": step, **values, "seconds": time.perf_counter() - start})
            run.scalars(step, {f"meta_train/{key}": value for key, value in values.items()})
            if progress.advance(**values):
                remembered, _ = gather(images, trajectory.query[: args.remember])
                statistics = gate_statistics(net, remembered)
                run.scalars(step, {"meta_train/steps_per_second": progress.report(), **statistics})
            if args.eval_every and step % args.eval_every == 0:
                validate(run, net, images, step, args.eval_classes)
            if step % args.save_every == 0 and step < args.steps:
                save(args, run, net, step)
            if interrupt.requested:
                break
    return progress.step


def save(args: argparse.Namespace, run: Run, net: Network, step: int) -> None:
    """Write the model to the run folder and to `--model_name`."""
    for path in (run.folder / "model.net", args.model_name):
        save_checkpoint(path, type(net).__name__, net.widths, net.state_dict(), recorded(args), step)


def main() -> None:
    args = parse(training_parser())
    log_to_terminal()
    device = choose_device(args.device, args.threads)
    net = initial_network(args)
    check_writable(args.model_name)
    images, about = load_pool(args, "background", args.train_classes, net.head.out_features, device)
    extra = {"device": str(device), **about}
    with Run.create(args.runs_dir, args.name, args, extra) as run, Interrupt() as interrupt:
        log.info("run folder %s, device %s", run.folder, device)
        step = train(args, run, net.to(device), images, interrupt)
        save(args, run, net, step)
        log.info("step %d of %d: model written to %s", step, args.steps, args.model_name)
    if step < args.steps:
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
