"""The method on a GPU: the CPU's numbers, and no step that waits for the device."""

from __future__ import annotations

import pytest
import torch

from datasets.samplers import sample_trajectory
from model.meta_learner import MetaLearner, gather, meta_gradient
from model.meta_test import FrozenStates, Learner
from model.modelfactory import trained_parameters
from tests.test_method import CLASSES, images, network
from utils.device import choose_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KINDS = [("ANML", 7), ("OML", 6)]


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize(("kind", "rln"), KINDS)
def test_meta_steps_as_on_the_cpu(kind: str, rln: int, first_order: bool) -> None:
    weights = []
    for name in ("cpu", "cuda"):
        device = choose_device(name)
        net, _ = network(kind)
        learner = MetaLearner(
            net.to(device),
            images(CLASSES, 20).to(device),
            torch.Generator().manual_seed(7),
            meta_lr=0.001,
            update_lr=0.03,
            rln=rln,
            first_order=first_order,
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
        pool = images(3, 20).to(device)
        fast = {n: net.get_parameter(n).detach().clone() for n in trained_parameters(net, rln)}
        fast = {n: weight.requires_grad_() for n, weight in fast.items()}
        Learner(net, rln, 0.001, fast).learn(FrozenStates(net, pool, rln), index)
        found.append([weight.detach().cpu() for weight in fast.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("first_order", [True, False])
def test_no_step_of_the_inner_loop_waits_for_the_device(first_order: bool) -> None:
    net, _ = network("ANML")
    device = choose_device("cuda")
    net.to(device)
    trajectory = sample_trajectory(CLASSES, 20, torch.Generator().manual_seed(0), update_step=4, remember=3)
    query, labels = gather(images(CLASSES, 20).to(device), trajectory.query)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta_gradient(net, query, labels, 4, rln=7, update_lr=0.1, first_order=first_order)
    finally:
        torch.cuda.set_sync_debug_mode(before)
