"""Model files and training states: what is written comes back; all else is refused in one line, and nothing
else happens."""

import io
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.modelfactory import build, restore
from model.optimizer import Adam
from model.outer_loops import BatchLoop
from model.training_state import load_state, restore_training
from tests.conftest import pooled
from tools.convert_released import convert
from utils.errors import UserError
from utils.files import Checkpoint, load_checkpoint

WIDTHS = {"nm_channels": 1, "pln_channels": 1, "num_classes": 2}
ARGUMENTS = {"steps": 3, "lr": 0.1, "name": "x", "saved_model": None, "lrs": [0.1]}
NET = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
WEIGHTS = dict(NET.state_dict())
SAVED = Checkpoint("ANML", WIDTHS, WEIGHTS, ARGUMENTS, 3)
ADAM, GENERATOR = Adam(NET.parameters(), 0.1).state_dict(), torch.Generator().get_state()
MODEL, STATE = SAVED.to_bytes(), replace(SAVED, optimizer=ADAM, generator=GENERATOR).to_bytes()


def content(sound: bytes = MODEL, **changes: Any) -> dict[str, Any]:
    return {**torch.load(io.BytesIO(sound)), **changes}


def torch_bytes(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "mask": torch.tensor([0.0, float("-inf")])}
    replace(SAVED, state_dict=weights).save(tmp_path / "new" / "m.net")
    found = load_checkpoint(tmp_path / "new" / "m.net")
    assert replace(found, state_dict=WEIGHTS) == SAVED
    torch.testing.assert_close(found.state_dict, weights, rtol=0, atol=0)
    older = Checkpoint.of_bytes(MODEL + bytes(32))  # a digest stood behind earlier states
    assert replace(older, state_dict=WEIGHTS) == SAVED


def test_views_are_saved_small(tmp_path: Path) -> None:
    replace(SAVED, state_dict={"row": torch.zeros(1000, 1000)[0]}).save(tmp_path / "view.net")
    assert (tmp_path / "view.net").stat().st_size < 20_000


def test_no_model_file(tmp_path: Path) -> None:
    """None at all, a folder, one that is cut short or altered, others' files."""
    path = tmp_path / "m.net"
    altered = bytearray(MODEL)
    altered[MODEL.index(WEIGHTS["head.weight"].numpy().tobytes())] ^= 1
    cut = (MODEL[:kept] for kept in (0, 1, 100, -200, -1))
    for data in (bytes(altered), *cut, b"hello", b"\x89PNG\r\n", b"PK\x03\x04", bytes(100), b"\x80\x02"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.net: (the file is damaged|it holds)"):
            load_checkpoint(path)
    for missing in (tmp_path / "absent.net", tmp_path):
        with pytest.raises(UserError, match=missing.name):
            load_checkpoint(missing)


def test_content_without_end(tmp_path: Path) -> None:
    """A list in itself, more numbers than memory holds, and what a state dict has beside its weights."""
    endless: list[object] = []
    endless.append(endless)
    many = torch.zeros(1).expand(10**14)
    for wrong in content(arguments={"a": endless}), content(state_dict={"w": many}):
        (tmp_path / "m.net").write_bytes(torch_bytes(wrong))
        with pytest.raises(UserError, match=r"m\.net: the file is damaged"):
            load_checkpoint(tmp_path / "m.net")
    weights = OrderedDict(WEIGHTS)
    weights._metadata = 5  # type: ignore[attr-defined]
    (tmp_path / "m.net").write_bytes(torch_bytes(content(state_dict=weights)))
    assert restore(load_checkpoint(tmp_path / "m.net"), "m.net").num_outputs == 2


@pytest.mark.parametrize(
    "wrong",
    [
        [1, 2],
        WEIGHTS,
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
    (tmp_path / "m.net").write_bytes(torch_bytes(wrong))
    with pytest.raises(UserError, match=r"m\.net: it is not a model of this project"):
        load_checkpoint(tmp_path / "m.net")


SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.none())
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TENSORS = st.sampled_from([torch.zeros(2), torch.ones(0), torch.tensor(float("nan")), torch.tensor(3)])
CONTENTS = st.dictionaries(
    st.sampled_from(["format", "network", "widths", "state_dict", "arguments", "step", "optimizer"]),
    st.one_of(JSON_VALUES, TENSORS, st.sampled_from(["anml-1", "anml-state-1", "ANML", WIDTHS])),
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Sound bytes of which up to three parts are replaced: by nothing, others, or themselves twice."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 100, len(data)])))
        data = data[:start] + draw(st.binary(max_size=8) | st.just(2 * data[start:stop])) + data[stop:]
    return data


def changed(sound: bytes) -> st.SearchStrategy[bytes]:
    """Files of other contents."""
    return CONTENTS.map(lambda changes: torch_bytes(content(sound, **changes)))


@settings(
    max_examples=150,
    deadline=None,  # a busy machine is no failure
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    data=st.one_of(
        *(damaged(MODEL), damaged(STATE), changed(MODEL), changed(STATE)),
        st.builds(torch_bytes, JSON_VALUES, st.booleans()),
        st.just(torch_bytes({"fc.weight": torch.zeros(3)}, zipped=False)).flatmap(damaged),
        st.binary(max_size=40),
    ),
    previous=st.booleans(),
)
def test_models_and_training_states(data: bytes, previous: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Made-up files are taken or refused, and nothing else happens."""
    caplog.set_level(logging.CRITICAL, "anml")  # thousands of warnings would be kept otherwise
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "m.net").write_bytes(data)
        (place / "state.pt").write_bytes(data)
        if previous:
            (place / "state.previous.pt").write_bytes(STATE)
        before = sorted(place.iterdir())
        readers: list[Callable[[], Checkpoint | None]] = [
            partial(load_checkpoint, place / "m.net"),
            partial(load_state, place),
        ]
        for read in readers:
            with suppress(UserError):
                found = read()
                assert found is not None
                net = restore(found, "m.net")
                if found.optimizer is not None:
                    loop = BatchLoop(net, pooled(torch.zeros(1, 1)), torch.Generator(), meta_lr=0.1)
                    restore_training(found, loop, "state.pt")
        with suppress(UserError):
            convert(place / "m.net")
        if previous:
            assert load_state(place) is not None
        assert sorted(place.iterdir()) == before
