"""The scripts on a GPU that this machine need not have: one like Apple's, made of the CPU's memory."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import evaluate_classification
import mrcl_classification
from tests.conftest import TINY, Run, rows
from tools import analyze_representation

aten = torch.ops.aten
DEVICE = torch.device("meta")  # the one device without hardware whose tensors autograd takes everywhere
MAY_MIX = (aten.copy_.default, aten.index.Tensor)  # indices may lie on the CPU


class OnDevice(Tensor):
    """A tensor of the device; what it holds is in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("outside of the mode")


class Apple(TorchDispatchMode):
    """Has no float64, computes with no tensor of the CPU, and takes no copy that does not wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        there = bool(ours)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        elif func is aten.copy_.default:
            there = isinstance(args[0], OnDevice)
        elif ours and func not in MAY_MIX:
            assert all(isinstance(x, OnDevice) or not x.ndim for x in tensors), f"{func} mixes devices"
        assert not kwargs.get("non_blocking"), "what was sent may be gone before it is read"

        assert all(isinstance(x, OnDevice) or x.device != DEVICE for x in tensors), "made behind the mode"
        held = [x.held if isinstance(x, OnDevice) else x for x in tensors]
        inside = {id(x): y for x, y in zip(tensors, held, strict=True)}
        outside = {id(x.held): x for x in ours}  # in-place operations return what they are given
        result = func(*tree_map_only(Tensor, lambda x: inside[id(x)], args), **kwargs)

        def wrap(x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("this device has no float64")
            return outside[id(x)] if id(x) in outside else OnDevice(x)

        return tree_map_only(Tensor, wrap, result) if there else result


@pytest.fixture
def script(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script on the device that is not there, or the CPU."""

    def no_pool(*args: object, **options: object) -> Tensor:
        raise RuntimeError("max_pool2d with return_indices=False has no second derivative on MPS")

    def start(module: ModuleType, *flags: str, device: torch.device = DEVICE) -> None:
        monkeypatch.setattr(module, "choose_device", lambda name, threads: device)
        with Apple():
            run(module, f"--cache_dir={cache}", *flags)

    def tensor(data: Any, device: Any = None, **options: Any) -> Tensor:
        return plain(data, **options).to(device)  # the mode does not see what is made on a device at once

    plain = torch.tensor
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "max_pool2d", no_pool)
    return start


def test_training_without_float64(script: Run) -> None:
    flags = (*TINY, "--log_every=1", "--meta_batch=2")
    checks = ("--eval_every=2", "--eval_classes=2", "--keep_every=1", "--steps=2")
    script(mrcl_classification, *flags, *checks)
    script(mrcl_classification, "--resume=runs/smoke_0", "--steps=3")
    script(mrcl_classification, *flags, "--steps=3", device=torch.device("cpu"))
    there, here = (rows(Path(f"runs/smoke_{k}")) for k in (0, 1))
    assert len(there) == len(here) == 3
    for ours, theirs in zip(there, here, strict=True):
        assert {key: float(value) for key, value in ours.items()} == pytest.approx(
            {key: float(value) for key, value in theirs.items()}, rel=1e-4
        )


def test_what_follows_training_without_float64(
    script: Run, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_classification, "FITTED", 20)
    glyphs = ("--dataset=glyphs", f"--model={models}/ANML.net", "--test_classes=6")
    for flags in (
        "--lrs 0.001 0.01 --lr_search_runs=1 --lr_search_split=background --runs=2 --track_every=1",
        "--lr=0.01 --runs=1 --rln=0 --iid",
        "--learner=map --runs=1",
        "--learner=slda --runs=1",
    ):
        script(evaluate_classification, *glyphs, "--schedule=2", "--backend=plain", *flags.split())
    script(analyze_representation, *glyphs)


def test_pretraining_without_float64(script: Run) -> None:
    small = ("--train_classes=20", "--num_classes=20", "--pln_channels=2", "--hidden=8", "--threads=1")
    script(mrcl_classification, "--learner=iid", "--dataset=glyphs", *small, "--steps=2", "--name=iid")
    script(mrcl_classification, "--resume=runs/iid_0", "--steps=3")
