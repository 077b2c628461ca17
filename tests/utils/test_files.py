"""Model files: what is written comes back, and nothing else does."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.errors import UserError
from utils.files import Checkpoint, load_checkpoint

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.zeros(2)}


WIDTHS = {"nm_channels": 4, "num_classes": 2}
ARGUMENTS = {"steps": 3, "lr": 0.1, "name": "x", "saved_model": None, "lrs": [0.1]}
MODEL_OF_3 = Checkpoint("ANML", WIDTHS, STATE, ARGUMENTS, 3)


def save(path: Path, **changes: Any) -> None:
    replace(MODEL_OF_3, **changes).save(path)


def content(**changes: Any) -> dict[str, Any]:
    return {**torch.load(io.BytesIO(MODEL_OF_3.to_bytes())), **changes}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, float("-inf")])
    save(tmp_path / "new" / "m.net", state_dict={**STATE, "mask": mask})
    found = load_checkpoint(tmp_path / "new" / "m.net")
    assert replace(found, state_dict=STATE) == MODEL_OF_3
    assert found.state_dict.keys() == {*STATE, "mask"}
    assert all(torch.equal(found.state_dict[name], x) for name, x in {**STATE, "mask": mask}.items())
    older = Checkpoint.of_bytes(MODEL_OF_3.to_bytes() + bytes(32))  # a digest stood behind earlier states
    assert replace(older, state_dict=STATE) == MODEL_OF_3


def test_views_are_saved_small(tmp_path: Path) -> None:
    save(tmp_path / "view.net", state_dict={"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / "view.net").stat().st_size < 20_000


def test_no_model_file(tmp_path: Path) -> None:
    """None at all, a folder, one that is cut short, others' files."""
    path = tmp_path / "m.net"
    save(path)
    whole = path.read_bytes()
    foreign = (b"hello", b"\x89PNG\r\n", b"PK\x03\x04", bytes(100), b"\x80\x02")
    for data in (*(whole[:kept] for kept in (0, 1, 100, -200, -1)), *foreign):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.net: (the file is damaged|it holds)"):
            load_checkpoint(path)
    altered = bytearray(whole)
    altered[whole.index(STATE["head.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(altered)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    for missing in (tmp_path / "absent.net", tmp_path):
        with pytest.raises(UserError, match=missing.name):
            load_checkpoint(missing)


@pytest.mark.parametrize(
    "wrong",
    [
        [1, 2],
        STATE,
        content(format="anml-99"),
        content(network=None),
        content(widths={"num_classes": torch.zeros(1)}),
        content(state_dict={}),
        content(state_dict={"w": 1.0}),
        content(state_dict={"w": torch.zeros(2, dtype=torch.complex64)}),
        content(inner_rule=[torch.zeros(2)]),
        content(inner_rule={"w": torch.tensor([float("nan")])}),
        content(state_dict={"w": torch.tensor([float("inf")])}),
        content(run=3),
        content(state_dict={"w": torch.eye(2).to_sparse()}),
        content(state_dict={1: torch.zeros(2)}),
        content(arguments=None),
        content(arguments={"t": torch.zeros(1)}),
        content(step=-1),
        content(step=1.5),
    ],
)
def test_wrong_content(wrong: object, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "right.net")
    load_checkpoint(tmp_path / "right.net")
    torch.save(wrong, tmp_path / "m.net")
    with pytest.raises(UserError, match=r"m\.net: it is not a model of this project"):
        load_checkpoint(tmp_path / "m.net")
