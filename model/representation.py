"""Sparsity and class structure of features and gate on unseen classes (paper, section 5).

The weights are those after meta-training; no weight changes here.
"""

from collections.abc import Mapping

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


@torch.no_grad()
def represent(net: Network, pool: Pool) -> dict[str, Pool]:
    """The input of the head for a pool of images, and its factors, on the pool's device, in `eval` mode.

    Returns:
        in this order `before`, rows [F], the features before the gate; `gate`, rows [G], its values; `after`,
        rows [F], the head's input. Without a gate `before` alone, which is the head's input then.
    """
    net = shared_copy(net)
    found = []
    for start in range(0, len(pool.rows), CHUNK):
        part = pool.take(slice(start, start + CHUNK))
        after, gate = net.features(part), net.gate(part)
        found.append([after] if gate is None else [net.features_before_gate(part), gate.flatten(1), after])
    pools = (Pool(torch.cat(rows), pool.sizes) for rows in zip(*found, strict=True))
    return dict(zip(("before", "gate", "after"), pools, strict=False))


def fraction(mask: Tensor) -> float:
    """Fraction of the values of a bool tensor that are true; on the CPU, since MPS has no float64."""
    return mask.cpu().double().mean().item()


def active_fraction(activations: Tensor) -> float:
    """Fraction of the values that are above `ACTIVE` (paper, section 5: active units)."""
    return fraction(activations > ACTIVE)


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


def measure(representation: Mapping[str, Pool], task: Task) -> dict[str, float]:
    """The paper's quantities, 0 to 1, for the pool that `task` indexes, by name in `results/targets.csv`.

    Activity is measured on the task's test images, and a unit is dead that is active for none of them. KNN
    uses the task's training images as examples and the test images as queries. The gate's quantities are left
    out for networks without a gate.
    """
    shown = {name: gather(rows, task.test)[0].flatten(0, 1) for name, rows in representation.items()}
    values = {f"active_{name}": active_fraction(seen) for name, seen in shown.items() if name != "gate"}
    if "gate" in shown:
        values["gate_mean"] = shown["gate"].cpu().double().mean().item()
    values["dead"] = 1 - fraction((shown.get("after", shown["before"]) > ACTIVE).any(0))
    for name, rows in representation.items():
        examples, labels = gather(rows, task.train.flatten(0, 1))
        truth = task.test[..., 0].flatten()
        values[f"knn_{name}"] = fraction(nearest_neighbours(examples, labels, shown[name]) == truth)
    return values


def principal_components(points: Tensor, count: int = 2) -> Tensor:
    """The first `count` principal components of points [N, F]: [N, count], on the CPU.

    A full SVD needs no random numbers. The sign of an axis is chosen so that its largest loading is positive.
    """
    points = points.cpu()  # not every device has the SVD
    centred = points - points.mean(0)
    axes: Tensor = torch.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return centred @ (axes * largest.sign()).t()
