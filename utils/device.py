"""Chooses where tensors live."""

from __future__ import annotations

import torch

from utils.distributed import environment
from utils.errors import UserError


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device for `--device`, and `--threads` CPU threads from now on (None: torch's choice).

    `auto` is CUDA where there is a GPU, then MPS, then the CPU. On CUDA, TF32 and non-deterministic
    kernels are off: the numbers are those of float32, and the same seed gives the same run. `cuda` without a
    number gives each process of a job on one machine a GPU of its own.

    Raises:
        UserError: the machine does not have that device.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, here in present.items() if here)
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", environment("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if present["cuda"] else 0
    if not present[device.type] or (device.type == "cuda" and (device.index or 0) >= gpus):
        here = [kind for kind, there in present.items() if there]
        count = f" ({gpus} GPUs)" if gpus else ""
        raise UserError(f"--device {name}: not on this machine; it has {', '.join(here)}{count}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return device


def seed_layers(seed: int) -> None:
    """Seed the generators that layers draw from (dropout), on the CPU and on the devices in use.

    `torch.manual_seed` does the same, and takes more than a millisecond where there is no GPU.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
