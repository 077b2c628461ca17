"""The method on a GPU: the CPU's numbers, and no step that waits for the device."""

from __future__ import annotations

import pytest
import torch

from datasets.samplers import sample_trajectory
from model.fast import meta_loss, use_backend
from model.learner import Settings
from model.meta_learner import MetaLearner, gather
from model.meta_test import FrozenOutputs, adam_learner, learn
from model.method import Params
from model.modelfactory import shared_copy, trained_parameters
from tests.test_method import CLASSES, images, network
from utils.device import choose_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KINDS = [("ANML", 7), ("OML", 6)]


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize(("kind", "rln"), KINDS)
def test_meta_steps_as_on_the_cpu(kind: str, rln: int, backend: str, first_order: bool) -> None:
    weights = []
    for name in ("cpu", "cuda"):
        device = choose_device(name)
        net, _ = network(kind)
        loss = meta_loss(use_backend(net, backend, device))
        learner = MetaLearner(
            net.to(device),
            images(CLASSES, 20).to(device),
            torch.Generator().manual_seed(7),
            meta_lr=0.001,
            update_lr=0.03,
            rln=rln,
            first_order=first_order,
            meta_loss=loss,
        )
        generator = torch.Generator().manual_seed(11)
        for _ in range(2):
            learner.step(sample_trajectory(CLASSES, 20, generator, update_step=4, remember=3))
        weights.append([parameter.detach().cpu() for parameter in net.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kind", "rln"), [("ANML", 13), ("ANML", 7), ("OML", 6)])
def test_meta_test_as_on_the_cpu(kind: str, rln: int) -> None:
    index = torch.tensor([[0, 1], [0, 2], [2, 5], [2, 6], [1, 0], [1, 3]])
    found = []
    for name in ("cpu", "cuda"):
        device = choose_device(name)
        net, _ = network(kind)
        net.to(device)
        pool, trained = images(3, 20).to(device), trained_parameters(net, rln)
        copied = shared_copy(net, trained)
        learn(adam_learner(copied, trained, Settings(0.001)), FrozenOutputs(net, pool, trained), index)
        found.append([copied.get_parameter(name).detach().cpu() for name in trained])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", ["plain", "fast"])
def test_no_step_of_the_inner_loop_waits_for_the_device(backend: str, first_order: bool) -> None:
    net, _ = network("ANML")
    device = choose_device("cuda")
    net.to(device)
    loss_of = meta_loss(use_backend(net, backend, device))
    trajectory = sample_trajectory(CLASSES, 20, torch.Generator().manual_seed(0), update_step=4, remember=3)
    query, labels = gather(images(CLASSES, 20).to(device), trajectory.query)
    params: Params = {name: net.get_parameter(name) for name in trained_parameters(net, 7)}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = net.frozen(query, params)
        support = inputs[-4:], labels[-4:]
        loss, _, _ = loss_of(net, params, support, (inputs, labels), inner_lr=0.1, first_order=first_order)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
