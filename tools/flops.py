"""The arithmetic of a meta-step, counted by hand: what the method asks for, whatever code computes it.

Counted are the multiply-adds of convolutions and linear layers, two floating-point operations (FLOPs)
each, with the three input channels of the published networks. Norms, activations, pooling, the loss,
biases and optimisers are not counted, and nothing is counted twice: a program that recomputes does
more than this, one that finds a shortcut (one input channel in place of three equal ones, say) less.

A convolution or linear layer is y = W x, and each product below is as many multiply-adds as the
forward one. Per image and layer:

| pass | products | layer that reads the image | other layers |
|---|---|---|---|
| forward | W x | 1 | 1 |
| backward | dW = dy x^T; dx = W^T dy | 1: nobody asks for dx | 2 |
| double backward | those below | 2 | 6 |

Double backward: an inner SGD step, W' = W - lr * dW, is differentiated once more. Write g(a) for the
gradient of the query loss with respect to a. From g(dW), which W' hands over, and g(dx), which the
layer before hands over (its dy is this dx), the product rule gives, for each of the three equations,

- dW = dy x^T:  g(dW) x to g(dy),  g(dW)^T dy to g(x);
- dx = W^T dy:  W g(dx) to g(dy),  dy g(dx)^T to g(W);
- y = W x:      W^T g(y) to g(x),  g(y) x^T to g(W).

The layer that reads the image has no dx and wants no g(x): g(dW) x and g(y) x^T remain.

Phases of a meta-step of ANML, `--rln 7` (NM learns in the outer loop only, the PLN and the head in both):

| phase | layers | images | passes |
|---|---|---|---|
| NM, whose gates serve both loops | NM | query: remember + trajectory, 84 | forward, backward |
| inner loop, batch 1 | PLN, head | trajectory, 20 | forward, backward |
| query at the adapted weights | PLN, head | query, 84 | forward, backward |
| second order only: the inner loop's steps, differentiated | PLN, head | trajectory, 20 | double backward |
"""

from __future__ import annotations

from collections.abc import Sequence

CHANNELS = 3  # of the images that the published networks read
KERNEL = 9  # 3x3
POSITIONS = (26 * 26, 11 * 11, 3 * 3)  # outputs of the three convolutions: 28 -> 26, 13 -> 11, 5 -> 3
FINAL = 9  # positions that the last convolution leaves


def trunk_products(channels: int) -> list[int]:
    """Multiply-adds of the three convolutions of NM or PLN, forward, for one image."""
    inputs = (CHANNELS, channels, channels)
    return [
        KERNEL * before * channels * positions for before, positions in zip(inputs, POSITIONS, strict=True)
    ]


def nm_products(nm_channels: int = 112, pln_channels: int = 256) -> list[int]:
    """Multiply-adds of each NM layer, forward, for one image: three convolutions and the gate."""
    return [*trunk_products(nm_channels), FINAL * nm_channels * FINAL * pln_channels]


def pln_products(pln_channels: int = 256, num_classes: int = 1000) -> list[int]:
    """Multiply-adds of each PLN layer and the head, forward, for one image."""
    return [*trunk_products(pln_channels), FINAL * pln_channels * num_classes]


def forward(products: Sequence[int]) -> int:
    """FLOPs of a chain's forward pass for one image.

    Args:
        products: multiply-adds of each layer; the first layer reads the image.
    """
    return 2 * sum(products)


def backward(products: Sequence[int]) -> int:
    """FLOPs of the backward pass to all weights and to all inputs but the image."""
    return 2 * (2 * sum(products) - products[0])


def double_backward(products: Sequence[int]) -> int:
    """FLOPs of differentiating forward and backward once more; see the module's table."""
    return 2 * (6 * sum(products) - 4 * products[0])


def meta_step(
    *,
    second_order: bool,
    steps: int = 20,
    remember: int = 64,
    nm_channels: int = 112,
    pln_channels: int = 256,
    num_classes: int = 1000,
) -> int:
    """FLOPs of one meta-step of ANML with `--rln 7`: 0.060 T in first order, 0.080 T in second.

    Args:
        second_order: differentiate through the inner loop.
        steps: images of the trajectory, that is inner steps.
        remember: images that the query has besides.
    """
    nm = nm_products(nm_channels, pln_channels)
    pln = pln_products(pln_channels, num_classes)
    query = steps + remember
    total = query * (forward(nm) + backward(nm)) + (steps + query) * (forward(pln) + backward(pln))
    return total + steps * double_backward(pln) if second_order else total
