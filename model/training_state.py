"""Training states, from which a run resumes with the same bits, in its run folder.

`state.pt` holds a model file's content, the optimizer and the random generator. `state.previous.pt` is the
state before that one, for the case that `state.pt` is damaged.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from model.modelfactory import image_arguments
from model.outer_loop import OuterLoop
from utils.distributed import is_first
from utils.errors import UserError
from utils.files import STATE, Checkpoint, keep_earlier, load_checkpoint
from utils.run import Run

log = logging.getLogger("anml")

NAME, PREVIOUS = "state.pt", "state.previous.pt"


def state_of(run: Run, loop: OuterLoop, step: int, arguments: Mapping[str, Any]) -> Checkpoint:
    """The state of a training with these arguments after `step` steps, which shares the loop's tensors."""
    return Checkpoint(
        loop.net.network,
        loop.net.widths,
        dict(loop.net.state_dict()),
        {**arguments, **image_arguments(loop.net)},
        step,
        dict(loop.rule.state_dict()) if loop.rule else {},
        run.started,
        loop.optimizer.state_dict(),
        loop.generator.get_state(),
    )


def restore_training(state: Checkpoint, loop: OuterLoop, source: str) -> None:
    """Load optimizer, generator and inner rule from a state, in place, or raise UserError if the state is of
    other weights; `source` names the state in the message."""
    try:
        loop.optimizer.load_state_dict(state.optimizer or {})
        loop.generator.set_state(torch.empty(0) if state.generator is None else state.generator)
        if loop.rule is not None:
            loop.rule.load_state_dict(state.inner_rule)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} does not hold a state of this run: {error}") from error


def save_progress(run: Run, loop: OuterLoop, step: int, arguments: Mapping[str, Any]) -> None:
    """Write the training state to the run folder, then the model to the run folder and to the argument
    `model_name`; rank 0 alone writes.

    Raises:
        UserError: a file cannot be written, or the weights are not finite; the earlier files stay.
    """
    if not is_first():
        return
    state, model_name = state_of(run, loop, step, arguments), Path(arguments["model_name"])
    state.save(run.folder / NAME, previous=run.folder / PREVIOUS)
    keep_foreign(run, model_name)
    run.saved = True
    for path in (run.folder / "model.net", model_name):
        save_model(path, state)


def keep_foreign(run: Run, model_name: Path) -> None:
    """Keep a model of another training under another name, and warn: when a run starts, or else when it saves
    for the first time. Two trainings with one `model_name` keep no more of each other's models.

    Raises:
        UserError: a file cannot be read or written.
    """
    if not is_first() or run.saved or not model_name.exists():
        return
    with suppress(UserError):
        if load_checkpoint(model_name).run == run.started:
            return
    kept = keep_earlier(model_name)
    log.warning("%s is the model of another training, and is kept as %s", model_name, kept)
    run.saved = True


@contextmanager
def claimed(model_name: Path) -> Iterator[None]:
    """A context in which other trainings that begin with the same `model_name` warn of this one."""
    lock = FileLock(model_name.with_name(f".{model_name.name}.lock"))
    try:
        if is_first():
            lock.acquire(timeout=0)
    except Timeout:
        log.warning("another training is at work on %s as well: choose with --model_name", model_name)
    except OSError:
        pass  # not every file system has locks
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()


def save_model(path: Path, state: Checkpoint) -> None:
    """Write the model of a training state; raises UserError like `Checkpoint.save`."""
    replace(state, optimizer=None, generator=None).save(path)


def load_state(folder: Path) -> Checkpoint | None:
    """The newest readable state of a run folder, on the CPU; None if the run saved none.

    A warning is logged where a newer state is damaged.

    Raises:
        UserError: states or a model exist, and no state is readable.
    """
    faults: list[str] = []
    for path in (folder / NAME, folder / PREVIOUS):
        try:
            state = Checkpoint.of_bytes(path.read_bytes(), STATE)
        except (OSError, ValueError) as error:
            faults.append(f"cannot read {path}: {error}")
            continue
        if faults:
            log.warning("%s; going on from %s, step %d", faults[0], path.name, state.step)
        return state
    if not any((folder / name).exists() for name in (NAME, PREVIOUS, "model.net")):
        return None
    raise UserError(
        f"{'; '.join(faults)}; the last weights are in {folder / 'model.net'}, which meta-training with "
        "--checkpoint --saved_model starts a new run from"
    )
