"""The method on a GPU: the CPU's numbers, and no step that waits for the device."""

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from datasets.task_sampler import Trajectory, sample_episode, sample_trajectory
from model.fast import BACKENDS
from model.fast.cuda_graph import CudaGraph
from model.learner import Given
from model.meta_test import FrozenOutputs, learn
from model.modelfactory import shared_copy, trained_parameters
from model.outer_loop import gather
from model.outer_loops import EpisodeLoop, TrajectoryLoop
from tests.conftest import pooled
from tests.model.test_method import CLASSES, images, network
from utils.distributed import choose_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_as_on_the_cpu(weights: Callable[[torch.device], Sequence[Tensor]]) -> None:
    """What `weights` gives on the one device and on the other is equal up to rounding."""
    ours, theirs = ([x.detach().cpu() for x in weights(choose_device(name))] for name in ("cuda", "cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def meta_learner(
    kind: str, rln: int, backend: str, first_order: bool, device: torch.device
) -> TrajectoryLoop:
    return TrajectoryLoop(
        *(network(kind, backend)[0].to(device), pooled(images(CLASSES, 20).to(device))),
        torch.Generator().manual_seed(7),
        meta_lr=0.001,
        backend=BACKENDS[backend],
        update_lr=0.03,
        first_order=first_order,
        rln=rln,
    )


def trajectory(generator: torch.Generator) -> Trajectory:
    return sample_trajectory([20] * CLASSES, generator, update_step=4, remember=3)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "rln"), [("ANML", 7), ("OML", 6)])
def test_meta_steps(kind: str, rln: int, backend: str, first_order: bool) -> None:
    def weights(device: torch.device) -> Sequence[Tensor]:
        learner = meta_learner(kind, rln, backend, first_order, device)
        generator = torch.Generator().manual_seed(11)
        for count in (1, 1, 2):
            learner.step(*(trajectory(generator) for _ in range(count)))
        assert isinstance(learner.meta_grads, CudaGraph) == (backend == "fast" and device.type == "cuda")
        return list(learner.net.parameters())

    assert_as_on_the_cpu(weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_episodes(backend: str) -> None:
    def weights(device: torch.device) -> Sequence[Tensor]:
        learner = EpisodeLoop(
            *(network("ANML", backend)[0].to(device), pooled(images(CLASSES, 20).to(device))),
            torch.Generator().manual_seed(7),
            meta_lr=0.001,
            shots=3,
            leave_one_out=True,
            augment=1,
        )
        for _ in range(3):
            learner.differentiate(
                sample_episode([20] * CLASSES, learner.generator, ways=6, images=5, symmetries=8)
            )
            learner.update()
        return [weight.detach().clone() for weight in learner.learned]

    assert_as_on_the_cpu(weights)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "rln"), [("ANML", 13), ("ANML", 7), ("ANML", 0), ("OML", 6)])
def test_meta_test(kind: str, rln: int, backend: str, optimizer: str) -> None:
    index = torch.tensor([[0, 1], [0, 2], [2, 5], [2, 6], [1, 0], [1, 3]])

    def weights(device: torch.device) -> Sequence[Tensor]:
        net = network(kind, backend)[0].to(device)
        pool, trained = pooled(images(3, 20).to(device)), trained_parameters(net, rln)
        copied = shared_copy(net, trained)
        online = BACKENDS[backend].adam_learner(copied, trained, Given(0.001), optimizer=optimizer)
        for part in index.split(4):
            learn(online, FrozenOutputs(net, pool, trained), part)
        return [copied.get_parameter(name) for name in trained]

    assert_as_on_the_cpu(weights)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_of_the_inner_loop_waits_for_the_device(backend: str, first_order: bool) -> None:
    learner = meta_learner("ANML", 7, backend, first_order, choose_device("cuda"))
    query, labels = gather(learner.images, trajectory(torch.Generator()).query)
    learner.meta_grads(query, labels, labels[-4:])  # what is chosen and captured once may wait
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        learner.meta_grads(query, labels, labels[-4:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
