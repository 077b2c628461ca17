"""Sparsity and class structure of features and gate on unseen classes (paper, section 5).

The weights are those after meta-training; no weight changes here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.images import Pool
from datasets.task_sampler import Task
from model.modelfactory import Network, shared_copy
from model.outer_loop import gather

CHUNK = 100  # images that pass through the network at a time
QUERIES = 500  # images whose distances to all examples are held at a time
ACTIVE = 0.01  # activation above which a unit counts as active (paper)
NEIGHBOURS = 5  # of the KNN classifier (paper)


@dataclass(frozen=True)
class Representation:
    """The input of the head for the images of a pool, and its two factors.

    Attributes:
        before: rows [F], the features before the gate; without a gate, the head's input.
        gate: rows [G], the values of the gate; None without a gate.
        after: rows [F], the head's input.
    """

    before: Pool
    gate: Pool | None
    after: Pool


@torch.no_grad()
def represent(net: Network, pool: Pool) -> Representation:
    """The representation of a pool of images, on the pool's device, in `eval` mode."""
    net = shared_copy(net)
    found = []
    for start in range(0, len(pool.rows), CHUNK):
        part = pool.take(slice(start, start + CHUNK))
        after, gate = net.features(part), net.gate(part)
        found.append([after] if gate is None else [net.features_before_gate(part), gate.flatten(1), after])
    pools = [Pool(torch.cat(rows), pool.sizes) for rows in zip(*found, strict=True)]
    return Representation(pools[0], pools[1] if len(pools) > 1 else None, pools[-1])


def fraction(mask: Tensor) -> float:
    """Fraction of the values of a bool tensor that are true; on the CPU, since MPS has no float64."""
    return mask.cpu().double().mean().item()


def active_fraction(activations: Tensor, threshold: float = ACTIVE) -> float:
    """Fraction of the values that are above `threshold` (paper, section 5: active units)."""
    return fraction(activations > threshold)


def dead_fraction(activations: Tensor) -> float:
    """Fraction of the units of `activations` [..., F] that are active for none of the images."""
    return 1 - fraction((activations.flatten(0, -2) > ACTIVE).any(0))


def nearest_neighbours(examples: Tensor, labels: Tensor, queries: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The class of each query by a majority vote of its k nearest examples (Euclidean distance).

    Among classes with equally many votes, the class of the nearest example wins.

    Args:
        examples: [E, F], E at least k.
        labels: [E] their classes.
        queries: [Q, F].

    Returns:
        [Q] classes, on the CPU.
    """
    # `cdist` computes distances from matmuls. In float32 these round away small differences between large
    # features, and not every device has float64.
    examples, queries, labels = examples.cpu().double(), queries.cpu().double(), labels.cpu()
    classes = []
    for part in queries.split(QUERIES):
        nearest = labels[torch.cdist(part, examples).topk(k, largest=False).indices]  # [Q, k]
        votes = (nearest[:, :, None] == nearest[:, None, :]).sum(2)
        # A vote counts k points minus the example's rank, so that ranks decide between equal votes only.
        rank = torch.arange(k)
        winner = (votes * k - rank).argmax(1, keepdim=True)
        classes.append(nearest.gather(1, winner).squeeze(1))
    return torch.cat(classes)


def knn_accuracy(activations: Pool, task: Task, k: int = NEIGHBOURS) -> float:
    """Fraction of the task's test images that KNN on its training images classifies right; `activations` are
    rows [F] of the pool that `task` indexes."""
    examples, labels = gather(activations, task.train.flatten(0, 1))
    queries, truth = gather(activations, task.test.flatten(0, 1))
    return fraction(nearest_neighbours(examples, labels, queries, k) == truth.cpu())


def measure(representation: Representation, task: Task) -> dict[str, float]:
    """The paper's quantities, 0 to 1, for the pool that `task` indexes, by name in `results/targets.csv`.

    Activity is measured on the task's test images. KNN uses the task's training images as examples and the
    test images as queries. The gate's quantities are left out for networks without a gate.
    """
    names = ("before",) if representation.gate is None else ("before", "gate", "after")
    shown = {name: gather(getattr(representation, name), task.test)[0] for name in (*names, "after")}
    values = {"active_before": active_fraction(shown["before"])}
    if "gate" in names:
        values["active_after"] = active_fraction(shown["after"])
        values["gate_mean"] = shown["gate"].cpu().double().mean().item()
    values["dead"] = dead_fraction(shown["after"])
    return values | {f"knn_{name}": knn_accuracy(getattr(representation, name), task) for name in names}


def principal_components(points: Tensor, count: int = 2) -> Tensor:
    """The first `count` principal components of points [N, F]: [N, count], on the CPU.

    A full SVD needs no random numbers. The sign of an axis is chosen so that its largest loading is positive.
    """
    points = points.cpu()  # not every device has the SVD
    centred = points - points.mean(0)
    axes: Tensor = torch.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return centred @ (axes * largest.sign()).t()
