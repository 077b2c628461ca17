"""The meta-loss and the online learner of the known networks, with all gradients written out.

An inner step adds an outer product to the head's weight, 1000 x 2304 numbers made of 3304. Kept as factors,
T of them cost T dot products per image in place of passes over the whole weight. The loop itself is
`model.method`'s; the run's start compares the two (`model.guard`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from model.fast.cuda_graph import GraphLearner
from model.fast.matmul import matmul
from model.fast.network import Batch, Features, refuse_create_graph
from model.layers import FrozenOutput, Inputs
from model.learner import Learner, Settings
from model.method import Examples, InnerLoop, OnlineLearner, Optimizer, Params
from model.modelfactory import Network
from model.optimizer import OPTIMIZERS

HEAD = ["head.weight", "head.bias"]


def meta_loss(
    net: nn.Module, params: Params, support: Examples, query: Examples, inner: InnerLoop
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.method.meta_loss`, of which it takes arguments, images as frozen outputs, and gives results.

    Raises:
        NotImplementedError: another inner rule, or a head that does not learn.
    """
    if inner.rule is not None or list(params)[-2:] != HEAD:
        raise NotImplementedError("model/fast knows SGD as inner rule, with a head that learns")
    assert isinstance(net, Network)
    assert isinstance(support[0], FrozenOutput)
    assert isinstance(query[0], FrozenOutput)
    # The first stage that learns may have parameters that the inner loop leaves alone.
    others = [name for name in Features(net, query[0]).names if name not in params]
    loop = _Loop(net, [*params, *others], list(params)[:-2], support, query, inner)
    tensors = [*params.values(), *map(net.get_parameter, others)]
    tensors += [*support[0].activations, *query[0].activations]
    loss, logits, inner_losses = _MetaLoss.apply(loop, *tensors)
    return loss, logits, inner_losses


class _Loop(NamedTuple):
    """What the meta-loss is of, beside the tensors that it is differentiated by."""

    net: Network
    names: list[str]  # of the parameters that the gradient is asked for
    body: list[str]  # those of them that the inner loop changes, but for the head's
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
        grads, ctx.grads = ctx.grads, None  # scaled in place, and so once
        return None, *(None if g is None else g.mul_(grad) for g in grads)


def _value_and_grads(
    loop: _Loop, params: Params, need: tuple[Sequence[bool], Sequence[bool]]
) -> tuple[tuple[Tensor, Tensor, Tensor], Params, list[Tensor | None]]:
    """Loss, logits and inner losses; gradients of the params; those of the inputs of support and query."""
    net, body, lr, steps = loop.net, loop.body, loop.inner.lr, len(loop.support[1])
    constant = loop.inner.constant(steps)
    head = _Head(params, lr, steps)
    passed, inner_losses = _adapt(loop, params, head, constant)

    weight, bias = head.weights()
    batch = Features(net, loop.query[0])(params)
    labels = loop.query[1]
    logits = matmul(batch.x, weight.t()) + bias
    loss = F.cross_entropy(logits, labels)
    grad_logits = (logits.softmax(1) - F.one_hot(labels, len(bias))) / len(labels)
    grads, of_query = batch.backward(matmul(grad_logits, weight), need[1])
    head.begin_backward(matmul(grad_logits.t(), batch.x), grad_logits.sum(0))
    del batch  # and all that its layers keep

    of_support: list[list[Tensor]] = [[] for _ in need[0]]
    for t in reversed(range(constant, steps)):
        batch = passed.pop()  # its activations go as soon as they have served
        v_grad_x = None
        if body:
            v_grad_x = batch.double_backward({n: g.mul(-lr if n in body else 0) for n, g in grads.items()})
        step_grads, of_inputs = batch.backward_both(head.backward(t, batch.x, v_grad_x), need[0])
        for name, grad in step_grads.items():
            grads[name] += grad
        for rows, row in zip(of_support, of_inputs, strict=True):
            if row is not None:
                rows.append(row)
    grads["head.weight"], grads["head.bias"] = head.grads()
    inputs = [
        torch.cat([rows[0].new_zeros(constant, *rows[0].shape[1:]), *reversed(rows)]) if rows else None
        for rows in of_support
    ]
    return (loss, logits, torch.stack(inner_losses)), grads, [*inputs, *of_query]


def _adapt(loop: _Loop, params: Params, head: _Head, constant: int) -> tuple[list[Batch], list[Tensor]]:
    """The inner loop, which changes `params` and the head: for each step but the first `constant` what its
    image passed; and the losses."""
    features = Features(loop.net, loop.support[0])
    passed, losses = [], []
    for t, label in enumerate(loop.support[1].split(1)):
        batch = features(params, slice(t, t + 1))
        logits = head.logits(batch.x)
        losses.append(F.cross_entropy(logits, label))
        grad_x = head.step(batch.x, logits, label, need_x=bool(loop.body))
        if loop.body:
            grads, _ = batch.backward(grad_x, [False] * len(loop.net.chains))
            params |= {name: params[name].add(grads[name], alpha=-loop.inner.lr) for name in loop.body}
        if t >= constant:
            passed.append(batch)
    return passed, losses


class _Head:
    """The head within a trajectory: its initial weights, the factors of its SGD steps, and gradients.

    After t steps W_t = W - lr * D_t' X_t and b_t = b - lr * sum(D_t), where X_t [t, F] are the features seen
    and D_t [t, O] the gradients of the logits. Step t computes l = W_t x + b_t, d = softmax(l) - onehot and
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
        """One SGD step; returns the gradient of x, [1, F], without meaning where not needed."""
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
        """Take the gradients of `weights()`."""
        self.grad_weight, self.grad_bias = grad_weight, grad_bias
        self.to_d = -self.lr * (matmul(self.x, grad_weight.t()) + grad_bias)
        self.to_x = -self.lr * matmul(self.d, grad_weight)
        self.factors: list[tuple[Tensor, Tensor]] = []  # outer products that the weight's gradient adds up

    def backward(self, t: int, x: Tensor, v_u: Tensor | None) -> Tensor:
        """The gradient of the x of step t, [1, F], from the cotangent of its u."""
        before, d, to_d = slice(t), self.d[t : t + 1], self.to_d[t : t + 1]
        if v_u is not None:
            to_d = to_d + self._forward(v_u, t)
            self.to_x[before] -= self.lr * (self.d[before] @ d[0])[:, None] * v_u
            self.to_d[before] -= self.lr * (self.x[before] @ v_u[0])[:, None] * d
            self.factors.append((d, v_u))
        p = self.softmax[t : t + 1]
        to_logits = p * (to_d - (p * to_d).sum())
        self.to_x[before] -= self.lr * (self.d[before] @ to_logits[0])[:, None] * x
        self.to_d[before] -= self.lr * (self.x[before] @ x[0] + 1)[:, None] * to_logits
        self.factors.append((to_logits, x))
        self.grad_bias = self.grad_bias + to_logits[0]
        return self.to_x[t : t + 1] + self._transposed(to_logits, t)

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


def adam_learner(net: Network, trained: Collection[str], settings: Settings) -> Learner:
    """`model.learner.adam_learner`: by hand on the CPU, on CUDA as a graph."""

    kind, lr = OPTIMIZERS[settings.optimizer], settings.lr
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
        self.grad_weight = torch.empty_like(self.params[-2], requires_grad=False)  # memory that stays

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
