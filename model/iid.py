"""Training on shuffled images of all meta-training classes: the first half of Pretrain & Transfer.

What meta-learning adds shows in comparison. Classes and number of images are those of meta-training. The
network is trained to tell these classes apart, and not to learn new ones without forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from datasets.images import Pool
from datasets.task_sampler import shuffled_batches
from model.meta_learner import OuterLoop, gather
from model.modelfactory import Network
from model.optimizer import Adam


class BatchStep(NamedTuple):
    """What one step measured before its update, as tensors on the device.

    Attributes:
        loss: mean cross-entropy of the batch.
        accuracy: fraction of the batch classified right.
    """

    loss: Tensor
    accuracy: Tensor


class IidLearner(OuterLoop):
    """Trains all layers on the mean cross-entropy of batches, one per step, with Adam.

    Args:
        net, images: see `OuterLoop`.
        generator: its seed gives all batches.
        meta_lr: Adam's step size.
        batch_size: images per step.

    Attributes:
        batches: for each step [batch_size, 2] (class, image). The first draw leaves out the batches of the
            steps that Adam has made: it comes after a training state is restored.
    """

    def __init__(
        self,
        net: Network,
        images: Pool | Tensor,
        generator: torch.Generator,
        *,
        meta_lr: float,
        batch_size: int,
    ) -> None:
        learned = [weight for weight in net.parameters() if weight.requires_grad]
        super().__init__(net, images, generator, learned, Adam(learned, meta_lr))
        self.batches = self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[Tensor]:
        seed, done = self.generator.initial_seed(), int(self.optimizer.steps[0].item())
        yield from shuffled_batches(self.images.sizes, seed, batch_size=batch_size, skip=done)

    def differentiate(self, index: Tensor) -> BatchStep:
        """The first half of a step: leave the gradient of a batch's loss in `grads`.

        Args:
            index: [B, 2] (class, image).
        """
        images, labels = gather(self.images, index)
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        self.grads = self.grads_of(loss)
        correct = logits.detach().argmax(1) == labels
        return BatchStep(loss.detach(), correct.to(loss.dtype).mean())
