"""Meta-training for a head of class means: what a network learns when its classes come and go.

Snell et al., *Prototypical networks for few-shot learning* (2017). An episode draws classes and a few images
of each; the means of their features are the head, and the loss is how well it tells the classes of other
images. Nothing is adapted, so there is one gradient a step and no inner loop. At meta-test such a head is
made by running sums, which one pass over the stream gives and which forget nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from datasets.images import Pool
from datasets.task_sampler import Episode, distort, show
from model.meta_learner import OuterLoop, gather
from model.modelfactory import Network
from model.optimizer import Adam


def prototype_logits(features: Tensor, shots: int, leave_one_out: bool = False) -> Tensor:
    """Logits of the queries of an episode: minus squared distance to each class mean, over sqrt(F).

    Args:
        features: [W, K, F] of K images of each of W classes.
        shots: images of each class that its mean is of; the others are the queries.
        leave_one_out: all images are queries, and the means of all: but an image meets its own class as
            the mean of the others.

    Returns:
        [W * (K - shots), W] or [W * K, W], class after class.
    """
    ways, images, size = features.shape
    means = features.mean(1) if leave_one_out else features[:, :shots].mean(1)
    queries = (features if leave_one_out else features[:, shots:]).flatten(0, 1)
    distances = (queries**2).sum(1, keepdim=True) + (means**2).sum(1) - 2 * queries @ means.t()
    if leave_one_out:  # from the mean of the others it is K / (K - 1) times as far as from the mean of all
        own = (features - means[:, None]).pow(2).sum(2) * (images / (images - 1)) ** 2
        classes = torch.arange(ways, device=features.device).repeat_interleave(images)
        distances = distances.scatter(1, classes[:, None], own.flatten()[:, None])
    return -distances / math.sqrt(size)


class EpisodeStep(NamedTuple):
    """What one step measured, as tensors on the device.

    Attributes:
        loss: mean cross-entropy of the queries.
        accuracy: fraction of them classified right.
        scale: that multiplied the logits.
    """

    loss: Tensor
    accuracy: Tensor
    scale: Tensor


class Scale(nn.Module):
    """The learned scale of the logits, kept positive."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log_scale.exp()


class PrototypeLearner(OuterLoop):
    """Meta-trains the layers below the head, one episode per step, with Adam and a cosine schedule.

    Args:
        net, images, generator: see `OuterLoop`.
        meta_lr: Adam's step size at the first step.
        steps: length of the schedule, at whose end the step size is 0.
        shots, leave_one_out: see `prototype_logits`.
        augment: strength of `distort` on every image.
    """

    head = "ncm"

    def __init__(
        self,
        net: Network,
        images: Pool | Tensor,
        generator: torch.Generator,
        *,
        meta_lr: float,
        steps: int,
        shots: int,
        leave_one_out: bool = False,
        augment: float = 0,
    ) -> None:
        self.scale = Scale().to(images.device)
        head = {id(weight) for weight in net.head.parameters()}
        learned = [weight for weight in net.parameters() if weight.requires_grad and id(weight) not in head]
        learned += self.scale.parameters()
        super().__init__(net, images, generator, learned, Adam(learned, meta_lr), self.scale)
        self.meta_lr, self.steps, self.augment = meta_lr, steps, augment
        self.shots, self.leave_one_out = shots, leave_one_out

    def differentiate(self, episode: Episode) -> EpisodeStep:
        """The first half of a step: leave the gradient of an episode's loss in `grads`."""
        images, _ = gather(self.images, episode.index)  # [W, K, C, 28, 28]
        ways = len(images)
        images = show(images, episode.symmetries).flatten(0, 1)
        if self.augment:
            images = distort(images, self.generator, self.augment)
        features = self.net.features(images).unflatten(0, (ways, -1))
        scale = self.scale()
        logits = scale * prototype_logits(features, self.shots, self.leave_one_out)
        labels = torch.arange(ways, device=logits.device).repeat_interleave(len(logits) // ways)
        loss = F.cross_entropy(logits, labels)
        self.grads = self.grads_of(loss)
        correct = logits.detach().argmax(1) == labels
        return EpisodeStep(loss.detach(), correct.to(loss.dtype).mean(), scale.detach())

    def update(self) -> None:
        done = self.optimizer.steps[0].item()
        self.optimizer.lr = self.meta_lr * (1 + math.cos(math.pi * done / self.steps)) / 2
        super().update()
