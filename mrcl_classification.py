"""Meta-train ANML (or OML) on Omniglot.

    python mrcl_classification.py --rln 7 --meta_lr 0.001 --update_lr 0.1 --name mrcl_omniglot \
        --steps 20000 --seed 9 --model_name "Neuromodulation_Model.net"
    python mrcl_classification.py --config configs/anml_first_order.toml     # as released
    python mrcl_classification.py --dataset glyphs --steps 100               # without any data
    python mrcl_classification.py --resume runs/mrcl_omniglot_0              # go on after an interruption
    python mrcl_classification.py --config configs/prototypes.toml           # for a head of class means
    python mrcl_classification.py --learner iid                              # for Pretrain & Transfer
    python mrcl_classification.py --meta_batch 2 --processes 2               # two cores, or two GPUs

Each step draws a class, learns its 20 images one by one, and improves the weights it started from so
that afterwards these images and 64 others of all classes are classified right.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import logging
import math
import sys
import time
from typing import NoReturn

import numpy as np
import torch

from datasets import ImageSet, Pool
from datasets.task_sampler import (
    longest_share,
    sample_episode,
    sample_trajectory,
)
from evaluation.runs import gate_statistics, validate
from flags.training import Plan, Training
from model.check import check_network
from model.fast import choose_backend
from model.guard import Backend, Use
from model.iid import BatchStep, IidLearner
from model.meta_learner import MetaLearner, MetaStep, gather
from model.method import InnerLoop
from model.modelfactory import Network, build, fingerprint, restore
from model.prototypes import EpisodeStep, PrototypeLearner
from model.training_state import load_state, restore_training, save_model, save_progress, state_of
from utils.command_line import parse, plain, recorded
from utils.distributed import (
    Group,
    Interrupt,
    choose_device,
    is_first,
    join,
    launched,
    refuse_several,
    run_as,
    seed_layers,
)
from utils.errors import UserError, run_script
from utils.files import Checkpoint, check_writable, load_checkpoint
from utils.run import Progress, Run, log_to_terminal

log = logging.getLogger("anml")

OuterLearner = MetaLearner | PrototypeLearner | IidLearner
OUTER_LEARNERS: dict[str, type[OuterLearner]] = {
    "sgd": MetaLearner,
    "prototypes": PrototypeLearner,
    "iid": IidLearner,
}
"""What `--learner` names."""


def initial_network(args: Training, state: Checkpoint | None) -> Network:
    """The network to train: that of a training state, the one in `--saved_model`, or a new one."""
    source = args.saved_model if state is None else args.resume
    if source is None:
        return build(args.treatment, args.constructor, torch.Generator().manual_seed(args.seed))
    saved = load_checkpoint(source) if state is None else state
    if saved.network != args.treatment:
        raise UserError(f"{source} holds {saved.network}: add --treatment {saved.network}")
    return restore(saved.network, saved.widths, saved.state_dict, str(source))


def first_seed(args: Training, net: Network) -> int:
    """The seed of a new run's draws, 0 to 2**32 - 1: `--seed`, or with `--checkpoint` a function of it and of
    the weights to start from, which would else meet the draws again that made them.
    """
    if not args.checkpoint:
        return args.seed
    sequence = np.random.SeedSequence([args.seed, int(fingerprint(net), 16)])
    return int(sequence.generate_state(1)[0])


def make_learner(
    args: Training, plan: Plan, net: Network, images: Pool, group: Group, backend: Backend
) -> OuterLearner:
    """The outer loop of `--learner`."""
    parts = net, images, torch.Generator().manual_seed(first_seed(args, net))
    if args.learner == "iid":
        return IidLearner(*parts, meta_lr=args.meta_lr, batch_size=args.batch_size)
    if args.learner == "prototypes":
        return PrototypeLearner(
            *parts,
            meta_lr=args.meta_lr,
            steps=args.steps,
            shots=args.shots,
            leave_one_out=args.leave_one_out,
            augment=args.augment,
        )
    return MetaLearner(
        *parts,
        meta_lr=args.meta_lr,
        inner=inner_settings(args),
        rln=plan.rln,
        learn_update_lr=args.learn_update_lr,
        reset=args.reset,
        reset_copy=args.reset_copy,
        shard=group.shard,
        all_reduce=group.all_reduce,
        meta_loss=backend.meta_loss,
        capture=backend.capture,
    )


def inner_settings(args: Training) -> InnerLoop:
    """The inner loop of the flags."""
    return InnerLoop(args.update_lr, 0 if args.first_order else args.second_order_steps)


def differentiate(
    args: Training, learner: OuterLearner
) -> tuple[torch.Tensor, MetaStep | EpisodeStep | BatchStep]:
    """Draw what a step sees, and leave its gradient in `.grads`.

    Returns:
        [B, 2] (class, image) of some of its images, and what it measured.
    """
    size = learner.images.sizes, learner.generator
    if isinstance(learner, IidLearner):
        batch = next(learner.batches)
        return batch, learner.differentiate(batch)
    if isinstance(learner, PrototypeLearner):
        drawn = args.shots + args.queries
        episode = sample_episode(*size, ways=args.ways, images=drawn, symmetries=args.symmetries)
        return episode.index[:, 0], learner.differentiate(episode)
    trajectories = [
        sample_trajectory(*size, update_step=args.update_step, tasks=args.tasks, remember=args.remember)
        for _ in range(args.meta_batch)
    ]
    return trajectories[0].query[: args.remember], learner.differentiate(*trajectories)


def train(
    args: Training, plan: Plan, run: Run, learner: OuterLearner, group: Group, interrupt: Interrupt, done: int
) -> int:
    """Train after `done` steps until `--steps` or a signal; returns the number of steps done."""
    net, images, generator = learner.net, learner.images, learner.generator
    with Progress(args.steps, every=args.log_every, done=done) as progress:
        for step in range(done + 1, args.steps + 1):
            start = time.perf_counter()
            before = generator.get_state()
            # What layers draw (dropout) is resumed as well: the generator's state holds its first seed.
            seed_layers(generator.initial_seed() * 2**32 + step)
            shown, result = differentiate(args, learner)
            values = {key: value.item() for key, value in result._asdict().items() if value.ndim == 0}
            if not (math.isfinite(values["loss"]) and learner.finite()):
                generator.set_state(before)
                stop_diverged(args, plan, run, learner, step, values["loss"])
            learner.update()
            run.metrics({"step": step, **values, "seconds": time.perf_counter() - start})
            run.scalars(step, {f"meta_train/{key}": value for key, value in values.items()})
            if progress.advance(**values):
                statistics = gate_statistics(net, gather(images, shown)[0])
                run.scalars(step, {"meta_train/steps_per_second": progress.report(), **statistics})
            if args.eval_every and step % args.eval_every == 0 and is_first():
                validate(run, net, images, step, args.eval_classes, learner.head)
            if args.keep_every and step % args.keep_every == 0 and is_first():
                save_model(run.folder / f"model_{step}.net", state_after(args, plan, run, learner, step))
            if step % args.save_every == 0 and step < args.steps:
                save(args, plan, run, learner, step)
            if interrupt.agree(group):
                break
    return progress.step


def check_images(args: Training, images: ImageSet) -> None:
    """Raise UserError where the images are too few for the steps and checks that are asked for."""
    if args.learner == "prototypes":
        drawn = args.shots + args.queries
        images.require(drawn, f"--shots {args.shots} and --queries {args.queries}")
        size = images.sizes, torch.Generator()
        sample_episode(*size, ways=args.ways, images=drawn, symmetries=args.symmetries)
    elif args.learner == "sgd":
        images.require(longest_share(args.update_step, args.tasks), f"--update_step {args.update_step}")
        size = images.sizes, torch.Generator()
        sample_trajectory(*size, update_step=args.update_step, tasks=args.tasks, remember=args.remember)
    if args.eval_every:
        images.require(2, f"--eval_every {args.eval_every}")
        if args.eval_classes > len(images):
            raise UserError(
                f"--eval_classes {args.eval_classes}: there are {len(images)} meta-training classes"
            )


def stop_diverged(
    args: Training, plan: Plan, run: Run, learner: OuterLearner, step: int, loss: float
) -> NoReturn:
    """Keep the weights before `step`, whose loss or gradient is not finite, and end the run."""
    if not is_first():
        sys.exit(2)  # rank 0 says why
    try:
        save(args, plan, run, learner, step - 1)
        kept = f"the state before it is in {run.folder}"
    except UserError as error:
        kept = f"the state before it is not kept: {error}"
    rates, one = f"--meta_lr {args.meta_lr:g}", "it"
    if learner.inner_loop:
        rates, one = f"{rates} --update_lr {args.update_lr:g}", "one of the learning rates"
    raise UserError(
        f"step {step}: the loss is {loss:g} and its gradient not finite with {rates} --seed "
        f"{args.seed}; lower {one}; {kept}"
    )


def save(args: Training, plan: Plan, run: Run, learner: OuterLearner, step: int) -> None:
    """Write the training state to the run folder, and the model there and to `--model_name`."""
    if is_first():
        save_progress(run, plan.model_name, state_after(args, plan, run, learner, step))


def state_after(args: Training, plan: Plan, run: Run, learner: OuterLearner, step: int) -> Checkpoint:
    """The training state after `step` steps."""
    parts = learner.net, learner.optimizer, learner.generator
    return state_of(run, *parts, step, recorded(args) | plain(vars(plan)), learner.rule)


def main() -> None:
    args = parse(Training)
    run_as(args.processes)
    log_to_terminal()
    device = choose_device(args.device, args.threads)
    inner_loop = OUTER_LEARNERS[args.learner].inner_loop
    if not inner_loop:
        refuse_several(f"--learner {args.learner}")
    group = join(device, recorded(args))
    if args.meta_batch < group.size:
        raise UserError(f"--meta_batch {args.meta_batch} is too few for {group.size} processes to share")
    state = load_state(args.resume) if args.resume else None
    done = state.step if state else 0
    if done > args.steps:
        raise UserError(f"--steps {args.steps}: {args.resume} has done {done}")
    net = initial_network(args, state)
    images = group.one_before_others(lambda: args.source().load("background"))
    images = images.limited(args.train_classes, "--train_classes", net.num_outputs)
    check_images(args, images)
    plan = Plan.of(args, len(images))
    if is_first():
        check_writable(plan.model_name, "--model_name")
    net.normalisation = images.normalisation or net.normalisation
    check_network(
        net.network,
        net.widths,
        plan.rln,
        second_order=inner_loop and inner_settings(args).second_order_steps != 0,
        channels=images.channels,
    )
    use = Use(
        net,
        rln=plan.rln,
        inner=inner_settings(args),
        update_step=args.update_step,
        learn_update_lr=args.learn_update_lr,
        channels=images.channels,
    )
    backend = choose_backend(args.backend, [net], device, use)
    learner = make_learner(args, plan, net.to(device).train(), images.pool(device), group, backend)
    if state:
        restore_training(state, learner.optimizer, learner.generator, str(args.resume), learner.rule)
    same = {"data": images.data_hash[:12], "weights": fingerprint(net)[:12], "steps done": done}
    group.check_same({**same, "backend": backend.name})
    extra = {"plan": plain(vars(plan), absolute=True), "device": str(device), **images.about()}
    extra |= {"backend": backend.name, "backend_why": backend.why}
    with (
        Interrupt(patient=launched()) as interrupt,
        Run.open(args.runs_dir, args.name, args.resume, args, extra, done) as run,
    ):
        log.info("run folder %s, device %s", run.folder, device)
        step = train(args, plan, run, learner, group, interrupt, done)
        save(args, plan, run, learner, step)
        log.info("step %d of %d: model written to %s", step, args.steps, plan.model_name)
        group.leave()
    if step < args.steps:
        sys.exit(interrupt.exit_code)


if __name__ == "__main__":
    run_script(main)
