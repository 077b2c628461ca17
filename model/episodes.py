"""Draws what one meta-step and one meta-test run see. Indices only; the images stay on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError


@dataclass(frozen=True)
class Trajectory:
    """One meta-training task, as indices into the meta-training classes.

    Attributes:
        classes: the sampled classes, whose head rows are drawn anew.
        support: [T, 2] (class, drawing) of the inner loop, in order.
        query: [R + T, 2] (class, drawing) of the outer loss: R remember images, then the support.
    """

    classes: list[int]
    support: Tensor
    query: Tensor


def sample_trajectory(
    num_classes: int,
    drawings: int,
    generator: torch.Generator,
    *,
    update_step: int = 20,
    tasks: int = 1,
    remember: int = 64,
) -> Trajectory:
    """A trajectory of `update_step` images and a remember set of `remember` images of all classes.

    The `tasks` classes come one after the other and share the images equally, the last one taking
    what is left (released code, `sample_training_data`). Images of a class come in random order and
    none twice; remember images are drawn without replacement.

    Args:
        num_classes: meta-training classes to draw from (963 in the paper).
        drawings: images per class (20).
        generator: source of all randomness.

    Raises:
        UserError: more classes or images asked for than there are.
    """
    share = update_step // tasks
    longest = update_step - share * (tasks - 1)
    if share < 1 or longest > drawings:
        raise UserError(
            f"--update_step {update_step} over --tasks {tasks} needs up to {longest} images of a "
            f"class and at least 1; a class has {drawings}"
        )
    if tasks > num_classes or remember > num_classes * drawings:
        raise UserError(
            f"--tasks {tasks} and --remember {remember} ask for more than the {num_classes} "
            f"meta-training classes of {drawings} images hold"
        )
    classes = torch.randperm(num_classes, generator=generator)[:tasks].tolist()
    parts = []
    for position, label in enumerate(classes):
        size = longest if position == tasks - 1 else share
        order = torch.randperm(drawings, generator=generator)[:size]
        parts.append(torch.stack([torch.full_like(order, label), order], 1))
    support = torch.cat(parts)
    drawn = torch.randperm(num_classes * drawings, generator=generator)[:remember]
    remembered = torch.stack([drawn // drawings, drawn % drawings], 1)
    return Trajectory(classes, support, torch.cat([remembered, support]))


@dataclass(frozen=True)
class Episode:
    """Some images of each of many classes, as indices into the meta-training classes.

    Attributes:
        index: [W, K, 2] (class, drawing).
        symmetries: [W] which symmetry of the square its images are shown in, see `augmentation.show`.
    """

    index: Tensor
    symmetries: Tensor


def sample_episode(
    num_classes: int,
    drawings: int,
    generator: torch.Generator,
    *,
    ways: int,
    images: int,
    symmetries: int = 1,
) -> Episode:
    """An episode of `ways` classes with `images` images each, all drawn without replacement.

    Args:
        num_classes: meta-training classes to draw from (963 in the paper).
        drawings: images per class (20).
        generator: source of all randomness.
        symmetries: classes that each class stands for, of which an episode may hold several.

    Raises:
        UserError: more classes or images asked for than there are.
    """
    if ways > num_classes * symmetries or images > drawings:
        raise UserError(
            f"--ways {ways} classes of --shots and --queries, {images} images each, are more than the "
            f"{num_classes * symmetries} meta-training classes of {drawings} images hold"
        )
    drawn = torch.randperm(num_classes * symmetries, generator=generator)[:ways]
    orders = torch.rand(ways, drawings, generator=generator).argsort(1)[:, :images]
    classes = (drawn // symmetries)[:, None].expand(ways, images)
    return Episode(torch.stack([classes, orders], 2), drawn % symmetries)


@dataclass(frozen=True)
class Task:
    """One meta-test draw, as indices into the pool of unseen classes.

    Attributes:
        train: [N, 15, 2] (class, drawing), class after class in the order they are learned.
        test: [N, 5, 2] (class, drawing), the other images of the same classes.
    """

    train: Tensor
    test: Tensor


def sample_task(
    pool: int,
    drawings: int,
    classes: int,
    generator: torch.Generator,
    *,
    train_images: int = 15,
    class_order: str = "random",
    split: str = "random",
) -> Task:
    """Draw `classes` of the first `pool` classes and split their images into train and test.

    Args:
        pool: classes to draw from (the released code uses ids 0..649 of 659).
        drawings: images per class (20).
        classes: length of the sequence.
        generator: source of all randomness.
        train_images: images of a class to train on; the others test.
        class_order: `random`, or `dataset` for the drawn classes in dataset order, as released.
        split: `random` per class, or `dataset` for the first 15 and the last 5, as released.

    Raises:
        UserError: the pool is smaller than `classes`.
    """
    if classes > pool:
        raise UserError(f"--schedule asks for {classes} classes; the pool holds {pool}")
    drawn = torch.randperm(pool, generator=generator)[:classes]
    if class_order == "dataset":
        drawn = drawn.sort().values
    orders = torch.stack([torch.randperm(drawings, generator=generator) for _ in range(classes)])
    if split == "dataset":
        orders = torch.arange(drawings).expand(classes, drawings)
    index = torch.stack([drawn[:, None].expand(classes, drawings), orders], 2)
    return Task(index[:, :train_images], index[:, train_images:])


def shuffled_batches(
    num_classes: int, drawings: int, generator: torch.Generator, *, total: int, batch_size: int
) -> Iterator[Tensor]:
    """Batches of an i.i.d. stream of `total` images: every image once, in random order, then again.

    Args:
        num_classes: classes to draw from.
        drawings: images per class (20).
        generator: source of all randomness.
        total: images in all batches together; an image counts each time it comes.
        batch_size: images in each batch; the last has what is left.

    Yields:
        [batch_size, 2] (class, drawing).
    """
    order = torch.empty(0, dtype=torch.long)
    for start in range(0, total, batch_size):
        size = min(batch_size, total - start)
        while len(order) < size:
            order = torch.cat([order, torch.randperm(num_classes * drawings, generator=generator)])
        drawn, order = order[:size], order[size:]
        yield torch.stack([drawn // drawings, drawn % drawings], 1)
