"""Ordinary supervised training, which meta-learning is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.modelfactory import Network
from model.optimizer import Adam


class Batch(NamedTuple):
    """What one step saw, before its update: mean cross-entropy, and the fraction classified right, in float64
    on the CPU, since MPS has none."""

    loss: Tensor
    accuracy: Tensor


def supervised_step(net: Network, optimizer: Adam, images: Tensor, labels: Tensor) -> Batch:
    """One step of Adam on the mean cross-entropy of a batch.

    Args:
        net: all of its layers learn.
        optimizer: over its parameters that require grad.
        images: [B, 1, 28, 28].
        labels: [B].
    """
    logits = net(images)
    loss = F.cross_entropy(logits, labels)
    # Biases before a norm have no effect, and so no gradient but zero.
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
    optimizer.step(gradients)
    return Batch(loss.detach(), (logits.argmax(1) == labels).cpu().double().mean())
