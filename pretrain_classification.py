"""Train a network on shuffled images of all meta-training classes: Pretrain & Transfer's first half.

    python pretrain_classification.py                       # OML's network, images as in meta-training
    python pretrain_classification.py --dataset glyphs --images 84000        # without any data
    python pretrain_classification.py --resume runs/pretrain_0               # go on after an interruption
    python evaluate_classification.py --model Pretrain_Model.net             # the other half

What meta-learning adds shows in comparison: the same network, classes and number of images, but
trained to tell the classes apart, not to learn new ones without forgetting.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import logging
import math
import sys
import time

import torch

from datasets import Pool
from datasets.task_sampler import shuffled_batches
from flags.pretraining import Pretraining
from model.check import check_network
from model.fast import choose_backend
from model.guard import Use
from model.meta_learner import gather
from model.modelfactory import Network, build, restore
from model.optimizer import Adam
from model.supervised import supervised_step
from model.training_state import load_state, restore_training, save_progress, state_of
from utils.checkpoint import Checkpoint
from utils.command_line import parse, recorded
from utils.device import choose_device, seed_layers
from utils.distributed import refuse_several
from utils.errors import UserError, run_script
from utils.files import check_writable
from utils.interrupt import Interrupt
from utils.run import Run, log_to_terminal

log = logging.getLogger("anml")


def train(
    args: Pretraining,
    run: Run,
    net: Network,
    images: Pool,
    state: Checkpoint | None,
    interrupt: Interrupt,
) -> int:
    """Train `net` until it has seen `--images` images or a signal comes; returns how many it has seen.

    With a `state`, the training of `net` goes on after it.
    """
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = Adam([weight for weight in net.parameters() if weight.requires_grad], args.lr)
    batches = shuffled_batches(images.sizes, generator, total=args.images, batch_size=args.batch_size)
    done = state.step if state else 0
    for _ in range(done):  # all 20,000 batches are drawn again in 0.2 s, from the seed alone
        next(batches)
    if state:
        restore_training(state, optimizer, generator, str(args.resume))
    seen: int = min(done * args.batch_size, args.images)
    steps = math.ceil(args.images / args.batch_size)

    def save(step: int) -> None:
        arguments = {**recorded(args), "train_classes": len(images.sizes), "weights": "pretrained"}
        save_progress(run, args.model_name, state_of(run, net, optimizer, generator, step, arguments))

    with run.progress(steps, every=args.log_every, done=done) as progress:
        for step, index in enumerate(batches, done + 1):
            start = time.perf_counter()
            seed_layers(args.seed * 2**32 + step)  # what layers draw (dropout) is resumed as well
            batch = supervised_step(net, optimizer, *gather(images, index))
            values = {"loss": batch.loss.item(), "accuracy": batch.accuracy.item()}
            if not math.isfinite(values["loss"]):
                raise UserError(f"the loss of step {step} is {values['loss']}: lower --lr {args.lr:g}")
            seen += len(index)
            run.metrics({"step": step, "images": seen, **values, "seconds": time.perf_counter() - start})
            run.scalars(step, {f"pretrain/{key}": value for key, value in values.items()})
            if progress.advance(**values):
                run.scalars(step, {"pretrain/images_per_second": progress.report() * args.batch_size})
            if step % args.save_every == 0 and step < steps:
                save(step)
            if interrupt.requested:
                break
    save(progress.step)
    return seen


def main() -> None:
    args = parse(Pretraining)
    log_to_terminal()
    refuse_several("pretraining")
    device = choose_device(args.device, args.threads)
    state = load_state(args.resume) if args.resume else None
    if state:
        net = restore(state.network, state.widths, state.state_dict, str(args.resume))
    else:
        net = build(args.treatment, args.constructor, torch.Generator().manual_seed(args.seed))
    check_writable(args.model_name, "--model_name")
    images = args.source().load("background")
    images = images.limited(args.train_classes, "--train_classes", net.num_outputs)
    net.normalisation = images.normalisation or net.normalisation
    check_network(net.network, net.widths, second_order=False, channels=images.channels)
    backend, why = choose_backend(args.backend, [net], device, Use(net, channels=images.channels))
    plan = {"train_classes": len(images)}
    extra = {"plan": plan, "device": str(device), "backend": backend, "backend_why": why, **images.about()}
    with (
        Interrupt() as interrupt,
        Run.open(args.runs_dir, args.name, args.resume, args, extra, state.step if state else 0) as run,
    ):
        log.info("run folder %s, device %s", run.folder, device)
        seen = train(args, run, net.to(device).train(), images.pool(device), state, interrupt)
        log.info("%d of %d images seen: model written to %s", seen, args.images, args.model_name)
    if seen < args.images:
        sys.exit(interrupt.exit_code)


if __name__ == "__main__":
    run_script(main)
