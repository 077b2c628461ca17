"""The method on a GPU: the CPU's numbers, and no step that waits for the device."""

from __future__ import annotations

import warnings

import pytest
import torch

from model.episodes import sample_episode, sample_trajectory
from model.fast import capture, learner, meta_loss, use_backend
from model.fast.cuda_graph import CudaGraph
from model.learner import Settings
from model.meta_learner import MetaLearner, gather
from model.meta_test import FrozenOutputs, learn
from model.modelfactory import shared_copy, trained_parameters
from model.prototypes import PrototypeLearner
from tests.model.test_method import CLASSES, images, network
from utils.device import choose_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KINDS = [("ANML", 7), ("OML", 6)]


def meta_learner(kind: str, rln: int, backend: str, first_order: bool, device: torch.device) -> MetaLearner:
    net, _ = network(kind)
    used = use_backend(net, backend, device)
    return MetaLearner(
        net.to(device),
        images(CLASSES, 20).to(device),
        torch.Generator().manual_seed(7),
        meta_lr=0.001,
        update_lr=0.03,
        rln=rln,
        first_order=first_order,
        meta_loss=meta_loss(used),
        capture=capture(used),
    )


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize(("kind", "rln"), KINDS)
def test_meta_steps_as_on_the_cpu(kind: str, rln: int, backend: str, first_order: bool) -> None:
    weights = []
    for name in ("cpu", "cuda"):
        learner = meta_learner(kind, rln, backend, first_order, choose_device(name))
        generator = torch.Generator().manual_seed(11)
        for count in (1, 1, 2):
            drawn = [
                sample_trajectory([20] * CLASSES, generator, update_step=4, remember=3) for _ in range(count)
            ]
            learner.step(*drawn)
        weights.append([parameter.detach().cpu() for parameter in learner.net.parameters()])
    assert isinstance(learner.meta_grads, CudaGraph) == (backend == "fast")
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", ["plain", "fast"])
def test_episodes_as_on_the_cpu(backend: str) -> None:
    weights = []
    for name in ("cpu", "cuda"):
        device = choose_device(name)
        net, _ = network("ANML")
        use_backend(net, backend, device)
        learner = PrototypeLearner(
            net.to(device),
            images(CLASSES, 20).to(device),
            torch.Generator().manual_seed(7),
            meta_lr=0.001,
            steps=10,
            shots=3,
            leave_one_out=True,
            augment=1,
        )
        for _ in range(3):
            learner.differentiate(
                sample_episode([20] * CLASSES, learner.generator, ways=6, images=5, symmetries=8)
            )
            learner.update()
        weights.append([weight.detach().cpu().clone() for weight in learner.learned])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("backend", ["plain", "fast"])
@pytest.mark.parametrize(("kind", "rln"), [("ANML", 13), ("ANML", 7), ("ANML", 0), ("OML", 6)])
def test_meta_test_as_on_the_cpu(kind: str, rln: int, backend: str, optimizer: str) -> None:
    index = torch.tensor([[0, 1], [0, 2], [2, 5], [2, 6], [1, 0], [1, 3]])
    found = []
    for name in ("cpu", "cuda"):
        device = choose_device(name)
        net, _ = network(kind)
        used = use_backend(net, backend, device)
        net.to(device)
        pool, trained = images(3, 20).to(device), trained_parameters(net, rln)
        copied = shared_copy(net, trained)
        online = learner("adam", used)(copied, trained, Settings(0.001, optimizer))
        for part in index.split(4):
            learn(online, FrozenOutputs(net, pool, trained), part)
        found.append([copied.get_parameter(name).detach().cpu() for name in trained])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", ["plain", "fast"])
def test_no_step_of_the_inner_loop_waits_for_the_device(backend: str, first_order: bool) -> None:
    learner = meta_learner("ANML", 7, backend, first_order, choose_device("cuda"))
    trajectory = sample_trajectory(
        [20] * CLASSES, torch.Generator().manual_seed(0), update_step=4, remember=3
    )
    query, labels = gather(learner.images, trajectory.query)
    learner.meta_grads(query, labels, labels[-4:])  # what is chosen and captured once may wait
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        learner.meta_grads(query, labels, labels[-4:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
