"""What has to happen before torch is used: every script imports this module first.

Older releases than `requirements.txt` asks for are refused here, in one line and before anything of them that
may be missing is looked for.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from utils.errors import refuse

FLOORS = Path(__file__).parents[1] / "requirements.txt"
UNUSED = ("tensorboard",)  # shows what a run leaves behind, in a process of its own


def numbers(release: str) -> tuple[int, ...]:
    """Those that a release begins with: (2, 9, 0) of 2.9.0a0+cpu."""
    found = re.match(r"\d+(\.\d+)*", release)
    return tuple(map(int, found[0].split("."))) if found else ()


def too_old() -> str | None:
    """Which package here is older than the floor, and what to do; None if none is."""
    for name, floor in re.findall(r"^(\w+)>=([\d.]+)", FLOORS.read_text(encoding="utf-8"), re.MULTILINE):
        try:
            here = str(torch.__version__) if name == "torch" else version(name)
        except PackageNotFoundError:
            continue  # not needed by this Python, or installed in another way
        if name not in UNUSED and numbers(here) < numbers(floor):
            return f"{name} {here} is too old, {floor} is needed: pip install -r {FLOORS}"
    return None


message = too_old()
if message is not None:
    refuse(message)
