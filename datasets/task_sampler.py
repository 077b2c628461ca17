"""Draws the images of a meta-step and of a meta-test run, as indices; the pixels stay on the device.

Episodes may have more than there is: other classes by symmetries, and distorted drawings of a class.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from datasets.images import SIZE
from utils.errors import UserError

TURN = math.radians(12)
STRETCH = math.log(1.15)
SHEAR = 0.15
SHIFT = 2  # pixels of images of 28; of larger images, the same part of the side
"""How far `distort` goes, each way, at strength 1."""


@dataclass(frozen=True)
class Trajectory:
    """One meta-training task, as indices (class, image) into the meta-training classes.

    Attributes:
        classes: the sampled classes, whose head rows are drawn anew.
        support: [T, 2] of the inner loop, in order.
        query: [R + T, 2] of the outer loss: R remember images, then the support.
    """

    classes: list[int]
    support: Tensor
    query: Tensor


def _pairs(positions: Tensor, sizes: Sequence[int]) -> Tensor:
    """[..., 2] (class, image) of positions [...] among all images, class after class."""
    ends = torch.tensor(sizes).cumsum(0)
    labels = torch.searchsorted(ends, positions, right=True)
    return torch.stack([labels, positions - ends[labels] + torch.tensor(sizes)[labels]], -1)


def longest_share(update_step: int, tasks: int) -> int:
    """How many images a trajectory has of its last class. It has no more of any other class."""
    return update_step - update_step // tasks * (tasks - 1)


def sample_trajectory(
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    update_step: int = 20,
    tasks: int = 1,
    remember: int = 64,
) -> Trajectory:
    """A trajectory of `update_step` images and a remember set of `remember` images of all classes.

    The `tasks` classes come one after the other. Each has an equal share of the images, and the last class
    has what is left as well (released code, `sample_training_data`). Images of a class come in random order.
    No image comes twice in the trajectory, and none twice in the remember set.

    Args:
        sizes: images of each of the meta-training classes (in the paper 963 times 20).
        generator: source of all randomness.

    Raises:
        UserError: more classes or images asked for than there are.
    """
    share, longest = update_step // tasks, longest_share(update_step, tasks)
    if not share or longest > min(sizes) or tasks > len(sizes) or remember > sum(sizes):
        raise UserError(
            f"--update_step {update_step} over --tasks {tasks}, 1 to {longest} images of a class, and "
            f"--remember {remember} ask for more than {len(sizes)} meta-training classes of {min(sizes)} or "
            f"more images, {sum(sizes)} in all, hold"
        )
    classes = torch.randperm(len(sizes), generator=generator)[:tasks].tolist()
    parts = []
    for label, size in zip(classes, [share] * (tasks - 1) + [longest], strict=True):
        order = torch.randperm(sizes[label], generator=generator)[:size]
        parts.append(torch.stack([torch.full_like(order, label), order], 1))
    support = torch.cat(parts)
    remembered = _pairs(torch.randperm(sum(sizes), generator=generator)[:remember], sizes)
    return Trajectory(classes, support, torch.cat([remembered, support]))


@dataclass(frozen=True)
class Episode:
    """Some images of each of many classes, as indices into the meta-training classes.

    Attributes:
        index: [W, K, 2] (class, image).
        symmetries: [W] the symmetry of the square in which the images of a class are shown; see
            `show`.
    """

    index: Tensor
    symmetries: Tensor


def sample_episode(
    sizes: Sequence[int], generator: torch.Generator, *, ways: int, images: int, symmetries: int = 1
) -> Episode:
    """An episode of `ways` classes with `images` images each, all drawn without replacement.

    Args:
        sizes: images of each of the meta-training classes (in the paper 963 times 20).
        generator: source of all randomness.
        symmetries: number of symmetries of the square in use. Each makes another class of a class, and an
            episode may hold several of these.

    Raises:
        UserError: more classes or images asked for than there are.
    """
    if ways > len(sizes) * symmetries or images > min(sizes):
        raise UserError(
            f"--ways {ways} classes of --shots and --queries, {images} images each, are more than the "
            f"{len(sizes) * symmetries} meta-training classes of {min(sizes)} images hold"
        )
    drawn = torch.randperm(len(sizes) * symmetries, generator=generator)[:ways]
    classes = drawn // symmetries
    numbers = torch.rand(ways, max(sizes), generator=generator)
    absent = torch.arange(max(sizes)) >= torch.tensor(sizes)[classes, None]
    orders = numbers.masked_fill(absent, 1).argsort(1)[:, :images]
    return Episode(torch.stack([classes[:, None].expand(ways, images), orders], 2), drawn % symmetries)


def show(images: Tensor, symmetries: Tensor) -> Tensor:
    """Images [N, ..., H, W], H = W, each turned or mirrored by one of the 8 `symmetries`, [N] on the CPU.

    Symmetries 0 to 3 are quarter turns; 4 to 7 are quarter turns of the mirrored image. A character that is
    turned or mirrored is another character.
    """
    shown = torch.empty_like(images)
    for k in symmetries.unique().tolist():
        rows = (symmetries == k).nonzero()[:, 0].to(images.device, non_blocking=images.is_cuda)
        chosen = images[rows].flip(-1) if k & 4 else images[rows]
        shown[rows] = chosen.rot90(k & 3, (-2, -1))
    return shown


def distort(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Images [B, C, H, W], each with probability one half turned, stretched, sheared and shifted at random.

    The other images stay as they are at meta-test: a distorted image has blurred lines.

    Args:
        generator: source of all randomness, on the CPU.
        strength: of all changes; 1 for up to `TURN`, `STRETCH`, `SHEAR` and `SHIFT`.
    """
    drawn = torch.rand(7, len(images), generator=generator) * 2 - 1
    angle, shear, wide, high, right, down = strength * drawn[:6]
    cosine, sine = torch.cos(TURN * angle), torch.sin(TURN * angle)
    wide, high = torch.exp(STRETCH * wide), torch.exp(STRETCH * high)
    pixel = 2 / SIZE  # of a side that goes from -1 to 1
    rows = [
        torch.stack([cosine * wide, (SHEAR * shear - sine) * wide, SHIFT * pixel * right], 1),
        torch.stack([sine * high, cosine * high, SHIFT * pixel * down], 1),
    ]
    maps = torch.stack(rows, 1).to(images.device, images.dtype, non_blocking=images.is_cuda)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    distorted = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    chosen = (drawn[6] > 0).to(images.device, non_blocking=images.is_cuda)
    return torch.where(chosen[:, None, None, None], distorted, images)


@dataclass(frozen=True)
class Task:
    """One meta-test draw, as indices into the pool of unseen classes.

    Attributes:
        train: [N, 15, 2] (class, image), class after class in the order they are learned.
        test: [N, 5, 2] (class, image), other images of the same classes.
    """

    train: Tensor
    test: Tensor


def sample_task(
    sizes: Sequence[int],
    classes: int,
    generator: torch.Generator,
    *,
    train_images: int = 15,
    test_images: int = 5,
    class_order: str = "random",
    split: str = "random",
    test_only: int = 0,
) -> Task:
    """Draw `classes` classes, and of each class some images to learn and others to test.

    Args:
        sizes: images of each class to draw from (the released code uses ids 0..649 of 659, 20 each).
        classes: length of the sequence.
        generator: source of all randomness.
        train_images: images of a class to learn.
        test_images: images of a class to test.
        class_order: `random`, or `dataset` for the drawn classes in dataset order, as released.
        split: `random` per class, or `dataset` for the first 15 and the last 5, as released.
        test_only: images of each class, the last ones, that the test images are drawn from; 0 for all.

    Raises:
        UserError: fewer classes than `classes`, or one with too few images.
    """
    spare = test_only - test_images if test_only else 0
    if classes > len(sizes) or train_images + test_images > min(sizes) - spare or spare < 0:
        raise UserError(
            f"--schedule asks for {classes} classes of --train_images {train_images} and --test_images "
            f"{test_images}; the pool holds {len(sizes)} of {min(sizes)} or more images"
        )
    drawn = torch.randperm(len(sizes), generator=generator)[:classes]
    if class_order == "dataset":
        drawn = drawn.sort().values
    number = train_images + test_images
    shown = [sizes[label] for label in drawn.tolist()]
    orders = [torch.randperm(size - test_only, generator=generator)[:number] for size in shown]
    if test_only:
        tests = [size - test_only + torch.randperm(test_only, generator=generator) for size in shown]
        orders = [torch.cat(both) for both in zip(orders, tests, strict=True)]
    if split == "dataset":
        orders = [torch.arange(size) for size in shown]
    chosen = torch.stack([torch.cat([order[:train_images], order[-test_images:]]) for order in orders])
    index = torch.stack([drawn[:, None].expand_as(chosen), chosen], 2)
    return Task(index[:, :train_images], index[:, train_images:])


def shuffled_batches(sizes: Sequence[int], seed: int, *, batch_size: int, skip: int = 0) -> Iterator[Tensor]:
    """Batches of an endless stream of images: all images in random order, then all in another random order.

    Args:
        sizes: images of each class.
        seed: of all random orders, 0 to 2**64 - 1.
        batch_size: images in each batch.
        skip: batches to leave out at the beginning. Drawing 20,000 of them takes 0.2 s.

    Yields:
        [batch_size, 2] (class, image).
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for number in count():
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(sum(sizes), generator=generator)])
        drawn, order = order[:batch_size], order[batch_size:]
        if number >= skip:
            yield _pairs(drawn, sizes)
