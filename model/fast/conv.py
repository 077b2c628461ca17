"""3x3 convolutions without padding and their gradients, for activations [B, H, W, C].

Over few output positions a convolution is a matmul with the im2col matrix of its patches. Over many positions
the forward pass is torch's convolution, and `winograd` computes the gradients where it is faster. No gradient
flows through any function here.

Kernels are [O, I, 3, 3] with the channels last in memory. The matrix that multiplies patches is then a view
of the kernel. Other layouts give the same numbers more slowly.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.fast import winograd
from model.fast.matmul import matmul

# Output positions of a batch, or of an image, up to which a matmul with patches is faster than convolutions.
FEW_POSITIONS, OF_AN_IMAGE = 256, 9
MANY_CHANNELS = 128  # below this number winograd's transforms cost more time than its matmuls save


class Input:
    """The input of a convolution, [B, H, W, I], with its im2col patches over few output positions."""

    def __init__(self, x: Tensor, stride: int) -> None:
        self.x, self.stride = x, stride
        self.out = (len(x), (x.shape[1] - 3) // stride + 1, (x.shape[2] - 3) // stride + 1)  # B, H', W'
        few = self.out[1] * self.out[2] <= max(FEW_POSITIONS // len(x), OF_AN_IMAGE)
        self.patches = self._im2col() if few else None

    def _im2col(self) -> Tensor:
        """The 3x3 patches as rows, [B * H' * W', 9 * I], each copied from three runs of memory."""
        x = self.x.contiguous()
        width, channels = x.shape[2:]
        image, row, pixel, _ = x.stride()
        strides = (image, self.stride * row, self.stride * pixel, width * channels, 1)
        runs = x.as_strided((*self.out, 3, 3 * channels), strides, x.storage_offset())
        return runs.reshape(-1, 9 * channels)

    def convolve(self, weight: Tensor) -> Tensor:
        """The output, [B, H', W', O]."""
        if self.patches is not None:
            return matmul(self.patches, _rows(weight).t()).view(*self.out, -1)
        # The CPU's channels-last kernel adds up 9 * I products one after the other, the contiguous kernel in
        # blocks. Blocks have a third of the rounding error, and so a third of the wrong decisions of ReLU and
        # max-pool.
        x = self.x.permute(0, 3, 1, 2).contiguous()
        return F.conv2d(x, weight.contiguous(), stride=self.stride).permute(0, 2, 3, 1).contiguous()

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input from the gradient of the output."""
        if self.patches is None:
            return self._gradients(grad, weight, True, False)[0]
        patches = matmul(grad.flatten(0, 2), _rows(weight)).view(*self.out, 3, 3, -1)
        return winograd.add_up(patches, self.stride, (self.x.shape[1], self.x.shape[2]))

    def gradients(self, grad: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
        """The gradients of the input, where needed, and of the kernel, from the output's gradient."""
        if self.patches is None:
            grad_x, grad_weight = self._gradients(grad, weight, need_x, True)
            return grad_x if need_x else None, grad_weight
        grad_weight = matmul(grad.flatten(0, 2).t(), self.patches).view(len(weight), 3, 3, -1)
        return self.grad_input(grad, weight) if need_x else None, grad_weight.permute(0, 3, 1, 2)

    def _gradients(self, grad: Tensor, weight: Tensor, *need: bool) -> tuple[Tensor, Tensor]:
        """Gradients of input and kernel over many positions; undefined where not needed."""
        if self.x.device.type == "cpu" and self.stride == 1 and min(weight.shape[:2]) >= MANY_CHANNELS:
            return winograd.gradients(grad, self.x, weight, *need)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(grad.permute(0, 3, 1, 2), self.x.permute(0, 3, 1, 2), weight, None),
            *([self.stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, (*need, False)),
        )
        return grad_x.permute(0, 2, 3, 1) if need[0] else grad, grad_weight


def _rows(weight: Tensor) -> Tensor:
    """A kernel [O, I, 3, 3] as the matrix [O, 9 * I] that multiplies patches."""
    return weight.permute(0, 2, 3, 1).flatten(1)
