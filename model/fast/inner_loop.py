"""The meta-loss and the online learner of the supported networks, with all gradients written out.

An inner step adds an outer product to the head's weight: 1000 x 2304 numbers from 1000 + 2304. Kept as
factors, T steps cost T dot products per image in place of passes over the whole weight. The loop is that of
`model.method`, with which `model.guard` compares the results.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from model.fast.cuda_graph import GraphLearner
from model.fast.matmul import matmul
from model.fast.network import Batch, Features, refuse_create_graph
from model.layers import FrozenOutput, Inputs
from model.learner import Given, Learner
from model.method import Examples, InnerLoop, OnlineLearner, Optimizer, Params
from model.modelfactory import Network
from model.optimizer import OPTIMIZERS

HEAD = ["head.weight", "head.bias"]


def meta_loss(
    net: nn.Module, params: Params, support: Examples, query: Examples, inner: InnerLoop
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `model.method.meta_loss`, with images as frozen outputs; raises NotImplementedError for
    an inner rule other than SGD, or a head that does not learn."""
    if inner.rule is not None or list(params)[-2:] != HEAD:
        raise NotImplementedError("model/fast knows SGD as inner rule, with a head that learns")
    assert isinstance(net, Network)
    assert isinstance(support[0], FrozenOutput)
    assert isinstance(query[0], FrozenOutput)
    # The first stage that learns may have parameters that the inner loop does not change.
    others = [name for name in Features(net, query[0]).names if name not in params]
    loop = _Loop(net, [*params, *others], list(params)[:-2], support, query, inner)
    tensors = [*params.values(), *map(net.get_parameter, others)]
    tensors += [*support[0].activations, *query[0].activations]
    loss, logits, inner_losses = _MetaLoss.apply(loop, *tensors)
    return loss, logits, inner_losses


class _Loop(NamedTuple):
    """Arguments of the meta-loss beside the tensors whose gradients are computed."""

    net: Network
    names: list[str]  # of the parameters whose gradients are computed
    body: list[str]  # names of the parameters that the inner loop changes, without the head's
    support: Examples
    query: Examples
    inner: InnerLoop


class _MetaLoss(torch.autograd.Function):
    """The meta-loss, whose gradients are computed together with its value."""

    @staticmethod
    def forward(ctx: Any, loop: _Loop, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, half = len(loop.names), (len(tensors) - len(loop.names)) // 2
        needed = ctx.needs_input_grad[1 + count :]
        (loss, logits, inner_losses), params, inputs = _value_and_grads(
            loop, dict(zip(loop.names, tensors, strict=False)), (needed[:half], needed[half:])
        )
        ctx.grads = [*(params[name] for name in loop.names), *inputs]
        ctx.mark_non_differentiable(logits, inner_losses)
        return loss, logits, inner_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        grads, ctx.grads = ctx.grads, None  # scaled in place, and so used once
        return None, *(None if g is None else g.mul_(grad) for g in grads)


def _value_and_grads(
    loop: _Loop, params: Params, need: tuple[Sequence[bool], Sequence[bool]]
) -> tuple[tuple[Tensor, Tensor, Tensor], Params, list[Tensor | None]]:
    """Loss, logits and inner losses; gradients of the params; gradients of the support and query inputs."""
    net, body, lr, steps = loop.net, loop.body, loop.inner.lr, len(loop.support[1])
    constant = loop.inner.constant(steps)
    head = _Head(params, lr, steps)
    batches, inner_losses = _adapt(loop, params, head, constant)

    weight, bias = head.weights()
    batch = Features(net, loop.query[0])(params)
    labels = loop.query[1]
    logits = matmul(batch.x, weight.t()) + bias
    loss = F.cross_entropy(logits, labels)
    grad_logits = (logits.softmax(1) - F.one_hot(labels, len(bias))) / len(labels)
    grads, query_grads = batch.backward(matmul(grad_logits, weight), need[1])
    head.begin_backward(matmul(grad_logits.t(), batch.x), grad_logits.sum(0))
    del batch  # frees the activations in its layers

    support_grads: list[list[Tensor]] = [[] for _ in need[0]]
    for t in reversed(range(constant, steps)):
        batch = batches.pop()  # removed, so that its activations are freed after this step
        v_grad_x = None
        if body:
            v_grad_x = batch.double_backward({n: g.mul(-lr if n in body else 0) for n, g in grads.items()})
        step_grads, input_grads = batch.backward_both(head.backward(t, batch.x, v_grad_x), need[0])
        for name, grad in step_grads.items():
            grads[name] += grad
        for rows, row in zip(support_grads, input_grads, strict=True):
            if row is not None:
                rows.append(row)
    grads["head.weight"], grads["head.bias"] = head.grads()
    inputs = [
        torch.cat([rows[0].new_zeros(constant, *rows[0].shape[1:]), *reversed(rows)]) if rows else None
        for rows in support_grads
    ]
    return (loss, logits, torch.stack(inner_losses)), grads, [*inputs, *query_grads]


def _adapt(loop: _Loop, params: Params, head: "_Head", constant: int) -> tuple[list[Batch], list[Tensor]]:
    """Run the inner loop, which changes `params` and the head; returns the batches of all steps after the
    first `constant`, and the losses of all steps."""
    features = Features(loop.net, loop.support[0])
    batches, losses = [], []
    for t, label in enumerate(loop.support[1].split(1)):
        batch = features(params, slice(t, t + 1))
        logits = head.logits(batch.x)
        losses.append(F.cross_entropy(logits, label))
        grad_x = head.step(batch.x, logits, label, need_x=bool(loop.body))
        if loop.body:
            grads, _ = batch.backward(grad_x, [False] * len(loop.net.chains))
            params |= {name: params[name].add(grads[name], alpha=-loop.inner.lr) for name in loop.body}
        if t >= constant:
            batches.append(batch)
    return batches, losses


class _Head:
    """The head within a trajectory: its initial weights, the factors of its SGD steps, and gradients.

    After t steps W_t = W - lr * D_t' X_t and b_t = b - lr * sum(D_t), where X_t [t, F] holds their features
    and D_t [t, O] the gradients of their logits. Step t computes l = W_t x + b_t, d = softmax(l) - onehot and
    u = W_t' d, the gradient of x.
    """

    def __init__(self, params: Params, lr: float, steps: int) -> None:
        self.weight, self.bias = (params[name].detach() for name in HEAD)
        self.lr = lr
        self.x = self.weight.new_empty(steps, self.weight.shape[1])
        self.d = self.weight.new_empty(steps, self.weight.shape[0])
        self.softmax = torch.empty_like(self.d)
        self.done = 0

    def logits(self, x: Tensor) -> Tensor:
        """[1, F] -> [1, O]"""
        return self._forward(x, self.done) + self.bias - self.lr * self.d[: self.done].sum(0)

    def step(self, x: Tensor, logits: Tensor, label: Tensor, need_x: bool) -> Tensor:
        """Take one SGD step; returns the gradient of x, [1, F], undefined where not needed."""
        t = self.done
        self.softmax[t] = logits.softmax(1)[0]
        self.d[t] = self.softmax[t] - F.one_hot(label[0], len(self.bias))
        grad_x = self._transposed(self.d[t : t + 1], t) if need_x else x
        self.x[t] = x[0]
        self.done += 1
        return grad_x

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias after all steps."""
        return (
            torch.addmm(self.weight, self.d.t(), self.x, alpha=-self.lr),
            self.bias - self.lr * self.d.sum(0),
        )

    def begin_backward(self, grad_weight: Tensor, grad_bias: Tensor) -> None:
        """Start the backward pass from the gradients of `weights()`."""
        self.grad_weight, self.grad_bias = grad_weight, grad_bias
        self.grad_d = -self.lr * (matmul(self.x, grad_weight.t()) + grad_bias)
        self.grad_x = -self.lr * matmul(self.d, grad_weight)
        self.factors: list[tuple[Tensor, Tensor]] = []  # their outer products add up to the weight's gradient

    def backward(self, t: int, x: Tensor, v_u: Tensor | None) -> Tensor:
        """The gradient of x at step t, [1, F], from the cotangent of u at step t (None: u was not used)."""
        before, d, grad_d = slice(t), self.d[t : t + 1], self.grad_d[t : t + 1]
        if v_u is not None:
            grad_d = grad_d + self._forward(v_u, t)
            self.grad_x[before] -= self.lr * (self.d[before] @ d[0])[:, None] * v_u
            self.grad_d[before] -= self.lr * (self.x[before] @ v_u[0])[:, None] * d
            self.factors.append((d, v_u))
        p = self.softmax[t : t + 1]
        grad_logits = p * (grad_d - (p * grad_d).sum())
        self.grad_x[before] -= self.lr * (self.d[before] @ grad_logits[0])[:, None] * x
        self.grad_d[before] -= self.lr * (self.x[before] @ x[0] + 1)[:, None] * grad_logits
        self.factors.append((grad_logits, x))
        self.grad_bias = self.grad_bias + grad_logits[0]
        return self.grad_x[t : t + 1] + self._transposed(grad_logits, t)

    def grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of the initial weight and bias."""
        if self.factors:
            left, right = (torch.cat(parts) for parts in zip(*self.factors, strict=True))
            self.grad_weight.addmm_(left.t(), right)
        return self.grad_weight, self.grad_bias

    def _forward(self, x: Tensor, t: int) -> Tensor:
        """W_t x, [1, F] -> [1, O]"""
        return matmul(x, self.weight.t()) - self.lr * (x @ self.x[:t].t()) @ self.d[:t]

    def _transposed(self, d: Tensor, t: int) -> Tensor:
        """W_t' d, [1, O] -> [1, F]"""
        return matmul(d, self.weight) - self.lr * (d @ self.d[:t].t()) @ self.x[:t]


def adam_learner(net: Network, trained: Collection[str], given: Given, *, optimizer: str = "adam") -> Learner:
    """`model.learner.adam_learner` with gradients written out on the CPU, and as a CUDA graph on CUDA."""
    kind, lr = OPTIMIZERS[optimizer], given.lr
    assert lr is not None
    learner = GraphLearner if net.head.weight.is_cuda else HandLearner
    return learner(net, trained, lambda params: kind(params, lr))


class HandLearner(OnlineLearner):
    """`OnlineLearner` with the gradients written out."""

    def __init__(
        self, net: Network, trained: Collection[str], optimizer: Callable[[list[Tensor]], Optimizer]
    ) -> None:
        super().__init__(net, trained, optimizer)
        self.trained = list(trained)
        self.all_params = dict(net.named_parameters())
        self.grad_weight = torch.empty_like(self.params[-2], requires_grad=False)  # reused by every update

    @torch.no_grad()
    def learn(self, images: Inputs, labels: Tensor) -> None:
        assert isinstance(self.net, Network)
        features = Features(self.net, images)
        need = [False] * len(self.net.chains)
        weight, bias = self.params[-2:]
        for t, target in enumerate(F.one_hot(labels, len(bias))):
            batch = features(self.all_params, slice(t, t + 1))
            grad_logits = (matmul(batch.x, weight.t())[0] + bias).softmax(0) - target
            grads: Params = {}
            if len(self.trained) > len(HEAD):
                grads, _ = batch.backward(matmul(grad_logits[None], weight), need)
            grads["head.weight"] = torch.outer(grad_logits, batch.x[0], out=self.grad_weight)
            grads["head.bias"] = grad_logits
            self.optimizer.step([grads[name] for name in self.trained])
