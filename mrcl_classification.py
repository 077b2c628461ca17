"""Meta-train ANML (or OML) on Omniglot.

    python mrcl_classification.py --rln 7 --meta_lr 0.001 --update_lr 0.1 --name mrcl_omniglot \
        --steps 20000 --seed 9 --model_name "Neuromodulation_Model.net"
    python mrcl_classification.py --config configs/anml_first_order.toml     # as released
    python mrcl_classification.py --dataset glyphs --steps 100               # without any data
    python mrcl_classification.py --resume runs/mrcl_omniglot_0              # go on after an interruption
    python mrcl_classification.py --config configs/prototypes.toml           # for a head of class means
    python mrcl_classification.py --learner iid                              # for Pretrain & Transfer
    python mrcl_classification.py --config configs/asb.toml                  # without a meta-gradient
    python mrcl_classification.py --meta_batch 2 --processes 2               # two cores, or two GPUs
    python mrcl_classification.py --seeds 9 10 11                            # three models, side by side

Each step draws a class, learns its 20 images one by one, and improves the weights it started from so
that afterwards these images and 64 others of all classes are classified right.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out
import anml_start  # noqa: F401 (before torch)

# isort: split

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from datasets.images import SIZE, ImageSet, Pool
from evaluation.plots import load_matplotlib
from evaluation.runs import gate_statistics, validate
from flags.training import Plan, Training
from model.check import DEFAULT, UPDATE_STEP, Use, check_network
from model.fast import choose_backend
from model.guard import Backend
from model.meta_test import with_outputs
from model.modelfactory import Network, build, fingerprint, restore
from model.outer_loop import OuterLoop, gather
from model.outer_loops import OUTER_LOOPS
from model.training_state import (
    claimed,
    keep_foreign,
    load_state,
    restore_training,
    save_model,
    save_progress,
    state_of,
)
from utils.command_line import as_tokens, parse, plain, recorded
from utils.distributed import Group, Interrupt, choose_device, is_first, join, run_as
from utils.errors import UserError, run_script
from utils.files import Checkpoint, check_writable, load_checkpoint
from utils.jobs import model_of, train_seeds
from utils.run import Progress, Run, log_to_terminal

log = logging.getLogger("anml")

OnStep = Callable[[int, Mapping[str, float], Network], object]
"""Called with the number of a step, from 1 on, what was measured in it, and the network."""


def initial_network(args: Training, state: Checkpoint | None) -> Network:
    """The network to train: that of a training state, the one in `--saved_model`, or a new one."""
    source = args.saved_model if state is None else args.resume
    if source is None:
        generator = torch.Generator().manual_seed(args.seed)
        return build(args.treatment, args.constructor, generator, args.size or SIZE)
    saved = load_checkpoint(source) if state is None else state
    if saved.network != args.treatment:
        raise UserError(f"{source} holds {saved.network}: add --treatment {saved.network}")
    return restore(saved, source)


def make_loop(args: Training, net: Network, images: Pool, group: Group, backend: Backend) -> OuterLoop:
    """The outer loop of `--learner`, with its flags and what the run gives to it."""
    seed = args.seed
    if args.checkpoint:  # the seed alone would repeat the draws that made the weights to start from
        sequence = np.random.SeedSequence([args.seed, int(fingerprint(net), 16)])
        seed = int(sequence.generate_state(1)[0])
    return OUTER_LOOPS[args.learner](
        *(net, images, torch.Generator().manual_seed(seed)),
        meta_lr=args.meta_lr,
        make_rule=args.make_rule,
        group=group,
        backend=backend,
        **args.loop,
    )


def steps(
    args: Training,
    arguments: Mapping[str, Any],
    run: Run,
    loop: OuterLoop,
    group: Group,
    interrupt: Interrupt,
    done: int,
    on_step: OnStep | None,
) -> int:
    """Train after `done` steps until `--steps` or a signal; returns the number of steps done."""
    generator = loop.generator
    with Progress(args.steps, every=args.log_every, done=done) as progress:
        for step in range(done + 1, args.steps + 1):
            start = time.perf_counter()
            before = generator.get_state()
            # What layers draw (dropout) is resumed as well: the generator's state holds its first seed.
            torch.manual_seed(generator.initial_seed() * 2**32 + step)
            shown, *drawn = loop.draw()
            measured = loop.gradient(*drawn)
            values = {name: value.item() for name, value in measured.items()}
            if not (math.isfinite(values["loss"] + values.get("penalty", 0)) and loop.finite()):
                generator.set_state(before)
                loop.undo()
                stop_diverged(args, arguments, run, loop, step, values["loss"])
            loop.optimizer.lr = args.rate(step - 1)
            loop.update()
            run.metrics({"step": step, **values, "seconds": time.perf_counter() - start})
            run.scalars(step, {f"meta_train/{name}": value for name, value in values.items()})
            if progress.advance(**values):
                statistics = gate_statistics(loop.net, gather(loop.images, shown)[0])
                run.scalars(step, {"meta_train/steps_per_second": progress.report(), **statistics})
            if args.eval_every and step % args.eval_every == 0 and is_first():
                validate(run, loop.net, loop.images, step, args.eval_classes, loop.head)
            if args.keep_every and step % args.keep_every == 0 and is_first():
                save_model(run.folder / f"model_{step}.net", state_of(run, loop, step, arguments))
            if step % args.save_every == 0 and step < args.steps:
                save_progress(run, loop, step, arguments)
            if on_step is not None:
                on_step(step, values, loop.net)
            if interrupt.agree(group):
                break
    return progress.step


def training_images(args: Training, net: Network, group: Group) -> ImageSet:
    """The meta-training classes; raises UserError where they are too few for what is asked for."""
    images = group.one_before_others(lambda: args.source(net).load("background"))
    images = images.limited(args.train_classes, "--train_classes")
    if args.eval_every:
        load_matplotlib()
        images.require(2, f"--eval_every {args.eval_every}")
        images.limited(args.eval_classes, "--eval_classes")
    return images


def stop_diverged(
    args: Training, arguments: Mapping[str, Any], run: Run, loop: OuterLoop, step: int, loss: float
) -> NoReturn:
    """Keep the weights before `step`, whose loss or gradient is not finite, and end the run."""
    if not is_first():
        sys.exit(2)  # rank 0 says why
    try:
        save_progress(run, loop, step - 1, arguments)
        kept = f"the state before it is in {run.folder}"
    except UserError as error:
        kept = f"the state before it is not kept: {error}"
    given = {**vars(args), **args.loop}
    rates = " ".join(f"--{name} {given[name]:g}" for name in loop.rates)
    one = "it" if len(loop.rates) == 1 else "one of the learning rates"
    raise UserError(
        f"step {step}: the loss is {loss:g} and its gradient not finite with {rates} --seed "
        f"{args.seed}; lower {one}; {kept}"
    )


def train_each(args: Training) -> Path:
    """Train a model for each of `--seeds`; returns the folder of their run folders."""
    cores = torch.get_num_threads() if choose_device(args.device, None).type == "cpu" else 1
    jobs = min(args.jobs or cores, len(args.seeds))
    flags = recorded(args) | {"threads": args.threads or max(1, torch.get_num_threads() // jobs)}
    flags |= dict.fromkeys(("seeds", "jobs", "config"))
    with Run.open(args.runs_dir, args.name, args.resume, args) as run:
        log.info("run folder %s, %d of %d trainings at a time", run.folder, jobs, len(args.seeds))
        train_seeds(Path(__file__), run.folder, args.seeds, jobs, args.steps, flags)
        log.info("models written to %s", model_of(run.folder, args.seeds[0]).with_stem("seed_*"))
    return run.folder


def train(argv: Sequence[str] = (), *, on_step: OnStep | None = None, **arguments: Any) -> Path:
    """Meta-train, as the command line does.

    Args:
        argv: flags as they are typed.
        on_step: called after each step.
        arguments: flags by name.

    Returns:
        the run folder; of several seeds, the folder of theirs.

    Raises:
        UserError: a flag or what it names is wrong, or a training diverges.
        SystemExit: a signal ended the training.
    """
    argv = [*argv, *as_tokens(arguments)]
    args = parse(Training, argv)
    run_as(args.processes, argv)
    log_to_terminal()
    if args.seeds:
        if on_step is not None:
            raise UserError("--seeds trains in processes of their own, which call no on_step")
        return train_each(args)
    device = choose_device(args.device, args.threads)
    inner = OUTER_LOOPS[args.learner].inner_loop(args.loop, args.make_rule)
    group = join(device, recorded(args))
    batch = args.loop.get("meta_batch", group.size)
    if batch < group.size:
        raise UserError(f"--meta_batch {batch} is too few for {group.size} processes to share")
    state = load_state(args.resume) if args.resume else None
    done = state.step if state else 0
    if done > args.steps:
        raise UserError(f"--steps {args.steps}: {args.resume} has done {done}")
    net = initial_network(args, state)
    images = training_images(args, net, group)
    net = with_outputs(net, len(images), args.seed)
    plan = Plan.of(args, len(images))
    if is_first():
        check_writable(plan.model_name, "--model_name")
    net.normalisation = images.normalisation or net.normalisation
    use = Use(
        rln=plan.rln,
        inner=inner or DEFAULT,
        update_step=args.loop.get("update_step", UPDATE_STEP),
        channels=images.channels,
    )
    second_order = inner is not None and inner.second_order_steps != 0
    check_network(net.network, net.widths, use, second_order=second_order, size=images.size)
    backend = choose_backend(args.backend, [net], device, use)
    loop = make_loop(args, net.to(device).train(), images.pool(device), group, backend)
    loop.check(images)
    if state:
        restore_training(state, loop, str(args.resume))
    same = {"data": images.data_hash[:12], "weights": fingerprint(net)[:12], "steps done": done}
    group.check_same({**same, "backend": backend.name})
    settings = recorded(args) | plain(vars(plan))
    extra = {"plan": plain(vars(plan), absolute=True), "device": str(device), **images.about()}
    extra |= {"backend": backend.name, "backend_why": backend.why}
    with (
        Interrupt() as interrupt,
        Run.open(args.runs_dir, args.name, args.resume, args, extra, done) as run,
        claimed(plan.model_name),
    ):
        log.info("run folder %s, device %s", run.folder, device)
        keep_foreign(run, plan.model_name)
        step = steps(args, settings, run, loop, group, interrupt, done, on_step)
        save_progress(run, loop, step, settings)
        log.info("step %d of %d: model written to %s", step, args.steps, plan.model_name)
        group.leave()
    if step < args.steps:
        sys.exit(128 + interrupt.signal)  # as a shell says it: 129, 130 or 143
    return run.folder


def main() -> None:
    train(sys.argv[1:])


if __name__ == "__main__":
    run_script(main)
