"""Train a network on shuffled images of all meta-training classes: Pretrain & Transfer's first half.

    python pretrain_classification.py                       # OML's network, images as in meta-training
    python pretrain_classification.py --dataset glyphs --images 84000        # without any data
    python evaluate_classification.py --model Pretrain_Model.net             # the other half

What meta-learning adds shows in comparison: the same network, classes and number of images, but
trained to tell the classes apart, not to learn new ones without forgetting.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time

import torch

from datasets import load_pool
from datasets.samplers import shuffled_batches
from model.meta_learner import gather
from model.modelfactory import Network, build
from model.optimizer import Adam
from model.supervised import supervised_step
from utils.arguments import network_widths, parse, pretraining_parser, recorded
from utils.checkpoint import save_checkpoint
from utils.device import choose_device
from utils.distributed import launched
from utils.errors import UserError, run_script
from utils.files import check_writable
from utils.interrupt import Interrupt
from utils.run import Run, log_to_terminal

log = logging.getLogger("anml")


def train(
    args: argparse.Namespace, run: Run, net: Network, images: torch.Tensor, interrupt: Interrupt
) -> tuple[int, int]:
    """Train `net` on `--images` images or until a signal; returns the steps done and the images seen."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = Adam(net.parameters(), args.lr)
    batches = shuffled_batches(
        len(images), images.shape[1], generator, total=args.images, batch_size=args.batch_size
    )
    seen = 0
    with run.progress(math.ceil(args.images / args.batch_size), every=args.log_every) as progress:
        for step, index in enumerate(batches, 1):
            start = time.perf_counter()
            batch = supervised_step(net, optimizer, *gather(images, index))
            values = {"loss": batch.loss.item(), "accuracy": batch.accuracy.item()}
            if not math.isfinite(values["loss"]):
                raise UserError(f"the loss of step {step} is {values['loss']}: lower --lr {args.lr:g}")
            seen += len(index)
            run.metrics({"step": step, "images": seen, **values, "seconds": time.perf_counter() - start})
            run.scalars(step, {f"pretrain/{key}": value for key, value in values.items()})
            if progress.advance(**values):
                run.scalars(step, {"pretrain/images_per_second": progress.report() * args.batch_size})
            if step % args.save_every == 0 and seen < args.images:
                save(args, run, net, step)
            if interrupt.requested:
                break
    return progress.step, seen


def save(args: argparse.Namespace, run: Run, net: Network, step: int) -> None:
    """Write the model to the run folder and to `--model_name`, marked as pretrained."""
    arguments = {**recorded(args), "weights": "pretrained"}
    for path in (run.folder / "model.net", args.model_name):
        save_checkpoint(path, type(net).__name__, net.widths, net.state_dict(), arguments, step)


def main() -> None:
    args = parse(pretraining_parser())
    log_to_terminal()
    if launched():
        raise UserError("pretraining runs in one process: start it without torchrun")
    device = choose_device(args.device, args.threads)
    check_writable(args.model_name)
    net = build(args.treatment, network_widths(args), torch.Generator().manual_seed(args.seed))
    images, about = load_pool(args, "background", args.train_classes, net.head.out_features, device)
    extra = {"device": str(device), **about}
    with Run.create(args.runs_dir, args.name, args, extra) as run, Interrupt() as interrupt:
        log.info("run folder %s, device %s", run.folder, device)
        step, seen = train(args, run, net.to(device), images, interrupt)
        save(args, run, net, step)
        log.info("%d of %d images seen: model written to %s", seen, args.images, args.model_name)
    if seen < args.images:
        sys.exit(interrupt.exit_code)


if __name__ == "__main__":
    run_script(main)
