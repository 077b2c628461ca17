"""Draws of images, of classes of several sizes: each image at most once, and all may come."""

from typing import Any

import pytest
import torch
from torch import Tensor

from datasets.task_sampler import sample_episode, sample_task, sample_trajectory, shuffled_batches
from utils.errors import UserError

SIZES = (9, 8, 30, 26)
EVERY = [(label, k) for label, size in enumerate(SIZES) for k in range(size)]


def pairs(index: Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, index.flatten(0, -2).tolist()))


def assert_drawn_once(index: Tensor) -> None:
    """Each row is of one class, whose images are there and come once."""
    assert (index[..., 0] == index[:, :1, 0]).all()
    assert set(pairs(index)) <= set(EVERY)
    assert all(len(set(pairs(row))) == len(row) for row in index)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_trajectory(generator: torch.Generator) -> None:
    trajectory = sample_trajectory(SIZES, generator, update_step=20, tasks=3, remember=len(EVERY))
    labels = trajectory.support[:, 0].tolist()
    assert [labels.count(label) for label in trajectory.classes] == [6, 6, 8]
    assert labels == sorted(labels, key=trajectory.classes.index)
    assert len({*pairs(trajectory.support)} & {*EVERY}) == 20
    remembered, support = trajectory.query.split([len(EVERY), 20])
    assert pairs(remembered) == EVERY
    assert torch.equal(support, trajectory.support)


def test_task(generator: torch.Generator) -> None:
    options: dict[str, Any] = {"train_images": 5, "test_images": 3}
    drawn = [sample_task(SIZES, 4, generator, **options) for _ in range(2)]
    released = sample_task(SIZES, 4, generator, **options, class_order="dataset", split="dataset")
    for task in (*drawn, released):
        assert (task.train.shape, task.test.shape) == ((4, 5, 2), (4, 3, 2))
        assert_drawn_once(torch.cat([task.train, task.test], 1))
    assert not torch.equal(drawn[0].train, drawn[1].train)
    assert pairs(released.train) == [(label, k) for label in range(4) for k in range(5)]
    assert pairs(released.test) == [
        (label, size - 3 + k) for label, size in enumerate(SIZES) for k in range(3)
    ]
    assert released.train[:, 0, 0].tolist() == [0, 1, 2, 3]
    for classes, train_images, says in (5, 5, "asks for 5 classes"), (2, 6, "holds 4 of 8 or more images"):
        with pytest.raises(UserError, match=says):
            sample_task(SIZES, classes, generator, train_images=train_images, test_images=3)


def test_episode_and_batches(generator: torch.Generator) -> None:
    assert_drawn_once(sample_episode(SIZES, generator, ways=8, images=5, symmetries=2).index)
    assert pairs(next(shuffled_batches(SIZES, 0, batch_size=len(EVERY)))) == EVERY
