"""Made-up input, most of it wrong: it is taken, or refused in one line, and nothing else happens."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import Source, omniglot
from datasets.omniglot import CLASSES
from evaluation.results import read_results, write_results
from evaluation.runs import Journal
from flags.evaluation import Evaluation
from flags.training import Training
from model.modelfactory import build, restore
from model.optimizer import Adam
from model.training_state import load_state, restore_training
from tools.convert_released import convert
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.command_line import Parser, parse
from utils.errors import UserError
from utils.flag import Flags
from utils.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"
LONGEST = 20  # seconds of CPU time that a case may take
WIDTHS = {"nm_channels": 1, "pln_channels": 1, "num_classes": 2}


def cases(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """That many cases, the same in every run."""
    return settings(
        max_examples=number,
        deadline=None,  # a busy machine is no failure; `refused_or` counts CPU time instead
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class HangError(Exception):
    """A case took too long."""


def _hang(number: int, frame: object) -> None:
    raise HangError


def refused_or(action: Callable[[], object]) -> object:
    """What `action` returns, or None if it was refused as a user is: one line, exit code 2."""
    stderr, before = io.StringIO(), signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        with contextlib.redirect_stderr(stderr):
            return action()
    except (UserError, SystemExit) as ended:
        refusal = ended
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if isinstance(refusal, SystemExit):
        assert refusal.code == 2
        assert stderr.getvalue().count("\n") == 1
        assert ": error: " in stderr.getvalue()
    else:
        assert str(refusal).strip()
    return None


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """An empty folder for one case."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of warnings would be kept otherwise."""
    caplog.set_level(logging.CRITICAL, "anml")


WORDS = st.sampled_from(
    [
        *("anml", "OML", "true", "1e-3", "10,20", "10 20", "nan", "-inf", "1e999", "-1", "0", "9" * 5000),
        *("--steps", "--", "=", "a" * 300, "x/" * 40 + "y", "file/below", ".", "cuda:99", "\udcff", "\0"),
        *("ANML-FT:PLN", "Scratch", "random", "evaluation"),
    ]
)
VALUES = st.one_of(
    WORDS,
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="/"), max_size=8),
)


def tokens(kind: type[Flags]) -> st.SearchStrategy[list[str]]:
    """Command lines: flags with values, with `=` or without, and what is no flag at all."""
    options = [option for action in Parser(kind).flags.values() for option in action.option_strings]
    flags = st.sampled_from([*options, *("--seeds", "--commit", "--resume", "--unknown")])
    joined = st.tuples(flags, VALUES).map(lambda pair: [f"{pair[0]}={pair[1]}"])
    apart = st.tuples(flags, VALUES).map(list)
    parts = st.lists(st.one_of(joined, apart, flags.map(lambda flag: [flag])), max_size=5)
    return parts.map(lambda lists: [token for part in lists for token in part])


@cases(350)
@given(data=st.data(), kind=st.sampled_from([Training, Evaluation]))
def test_flags(data: st.DataObject, kind: type[Flags]) -> None:
    argv = data.draw(tokens(kind))
    refused_or(lambda: parse(kind, argv))


PRESETS = [path.read_text() for path in sorted(CONFIGS.glob("*.toml"))]
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.none())
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.one_of(
    st.sampled_from([*Parser(Training).flags, *Parser(Evaluation).flags, "config", "resume", "notices"]),
    st.text(max_size=5),
)
SETTINGS = st.dictionaries(KEYS, JSON_VALUES, max_size=5)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Sound bytes with a few changes: cut, flipped, overwritten, repeated, put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 100, 10_000])))
        match draw(st.sampled_from(["cut", "flip", "put", "remove", "repeat"])):
            case "cut":
                data = data[:start]
            case "flip" if start < len(data):
                data = data[:start] + bytes([data[start] ^ draw(st.integers(1, 255))]) + data[start + 1 :]
            case "put":
                data = data[:start] + draw(st.binary(max_size=8)) + data[stop:]
            case "remove":
                data = data[:start] + data[stop:]
            case _:
                data = data[:stop] + data[start:]
    return data


@cases(150)
@given(
    content=st.one_of(
        st.sampled_from(PRESETS).flatmap(lambda text: damaged(text.encode())),
        st.binary(max_size=60),
    ),
    kind=st.sampled_from([Training, Evaluation]),
)
def test_configs(content: bytes, kind: type[Training] | type[Evaluation]) -> None:
    with folder() as place:
        (place / "c.toml").write_bytes(content)
        arguments = refused_or(lambda: parse(kind, ["--config", str(place / "c.toml")]))
        if isinstance(arguments, Training | Evaluation):
            assert not any("\0" in str(path) for path in (arguments.dataset_path, arguments.runs_dir))


def run_config(**settings_of_run: object) -> bytes:
    return json.dumps({"arguments": settings_of_run, "data_hash": "0"}).encode()


METRICS = b"step,loss,accuracy_trajectory,accuracy_remember,seconds\n1,2.0,0,1,0.1\n2,1.5,1,1,0.1\n"


@cases(100)
@given(
    config=st.one_of(
        SETTINGS.map(lambda s: run_config(**s)),
        damaged(run_config(steps=5, meta_lr=0.1, rln=None, name="n", reset=False)),
        JSON_VALUES.map(lambda value: json.dumps(value).encode()),
        st.just(b"[" * 100_000),
    ),
    metrics=damaged(METRICS),
    done=st.integers(0, 3),
)
def test_run_folders(config: bytes, metrics: bytes, done: int) -> None:
    with folder() as place:
        (place / "config.json").write_bytes(config)
        (place / "metrics.csv").write_bytes(metrics)
        arguments = refused_or(lambda: parse(Training, ["--resume", str(place)]))
        if arguments is None:
            assert (place / "config.json").read_bytes() == config
            arguments = parse(Training, [])
        assert isinstance(arguments, Training)
        settings_of_run = arguments
        run = refused_or(lambda: Run.open(place, "n", place, settings_of_run, {"data_hash": "0"}, done))
        if isinstance(run, Run):
            run.close()
            lines = (place / "metrics.csv").read_bytes().splitlines()[1:]
            steps = [int(line.partition(b",")[0]) for line in lines]
            assert steps == sorted(set(steps))
            assert set(steps) <= set(range(1, done + 1))
        else:
            assert (place / "metrics.csv").read_bytes() == metrics


def file_bytes(**training: Any) -> bytes:
    """A model file or, with `training`, a training state."""
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    return Checkpoint("ANML", WIDTHS, dict(net.state_dict()), {"steps": 3}, 3, **training).to_bytes()


def state_bytes() -> bytes:
    net = build("ANML", WIDTHS, torch.Generator().manual_seed(0))
    return file_bytes(
        optimizer=Adam(net.parameters(), 0.1).state_dict(), generator=torch.Generator().get_state()
    )


def torch_bytes(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


MODEL, STATE = file_bytes(), state_bytes()
TENSORS = st.sampled_from([torch.zeros(2), torch.ones(0), torch.tensor(float("nan")), torch.tensor(3)])
CONTENTS = st.dictionaries(
    st.sampled_from(["format", "network", "widths", "state_dict", "arguments", "step", "optimizer"]),
    st.one_of(JSON_VALUES, TENSORS, st.sampled_from(["anml-1", "anml-state-1", "ANML", WIDTHS])),
)


@cases(175)
@given(
    data=st.one_of(
        damaged(MODEL),
        damaged(MODEL),
        CONTENTS.map(lambda changes: torch_bytes({**torch.load(io.BytesIO(MODEL)), **changes})),
        st.builds(torch_bytes, JSON_VALUES, st.booleans()),
        st.just(torch_bytes({"fc.weight": torch.zeros(3)}, zipped=False)).flatmap(damaged),
        st.binary(max_size=40),
    )
)
def test_model_files(data: bytes) -> None:
    with folder() as place:
        path = place / "m.net"
        path.write_bytes(data)
        saved = refused_or(lambda: load_checkpoint(path))
        if isinstance(saved, Checkpoint):
            refused_or(lambda: restore(saved.network, saved.widths, saved.state_dict, "m.net"))
        refused_or(lambda: convert(path))
        assert [file.name for file in place.iterdir()] == ["m.net"]


@cases(125)
@given(
    newest=st.one_of(
        damaged(STATE),
        CONTENTS.map(lambda changes: torch_bytes({**torch.load(io.BytesIO(STATE)), **changes})),
    ),
    previous=st.booleans(),
)
def test_training_states(newest: bytes, previous: bool) -> None:
    with folder() as place:
        (place / "state.pt").write_bytes(newest)
        if previous:
            (place / "state.previous.pt").write_bytes(STATE)
        state = refused_or(lambda: load_state(place))
        assert isinstance(state, Checkpoint) or not previous
        if isinstance(state, Checkpoint):
            found = state

            def go_on() -> None:
                net = restore(found.network, found.widths, found.state_dict, "state.pt")
                restore_training(found, Adam(net.parameters(), 0.1), torch.Generator(), "state.pt")

            refused_or(go_on)


def result_files() -> dict[str, bytes]:
    rows = [
        {"model": "m", "classes": 2, "run": run, "lr": 0.1, "test": 0.5, "train": 1.0}
        | {"above_chance": 1, "diverged": 0}
        for run in (0, 1)
    ]
    with folder() as place:
        write_results(place, rows, {"treatment": "ANML"})
        Journal(place / "scores.csv").close()
        return {path.name: path.read_bytes() for path in place.iterdir()}


RESULTS = result_files()


@cases(150)
@given(
    csv=st.one_of(damaged(RESULTS["results.csv"]), st.just(RESULTS["results.csv"])),
    about=st.one_of(
        damaged(RESULTS["results.json"]),
        st.just(RESULTS["results.json"]),
        JSON_VALUES.map(lambda runs: json.dumps({"runs": runs}).encode()),
    ),
    scores=damaged(RESULTS["scores.csv"] + b"report,m,2,0,0.1,0.5,1.0,1,0\nreport,m,2,1,,0.5,1.0,1,1\n"),
)
def test_results(csv: bytes, about: bytes, scores: bytes) -> None:
    with folder() as place:
        files = {"results.csv": csv, "results.json": about, "scores.csv": scores}
        for name, data in files.items():
            (place / name).write_bytes(data)
        refused_or(lambda: read_results(place))
        refused_or(lambda: read_results(place / "results.json"))
        journal = refused_or(lambda: Journal(place / "scores.csv"))
        if isinstance(journal, Journal):
            journal.close()
        assert {path.name for path in place.iterdir()} == set(files)


@pytest.fixture
def few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one character a complete split, and a download one that fails."""
    for split in CLASSES:
        monkeypatch.setitem(CLASSES, split, 1)

    def download(split: str, archive: Path) -> None:
        raise UserError("no network")

    monkeypatch.setattr(omniglot, "_download", download)


def archive_bytes(compression: int) -> bytes:
    picture = io.BytesIO()
    Image.new("1", (105, 105), 1).save(picture, format="PNG")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for drawer in range(1, 21):
            name = f"images_background/A/character01/0001_{drawer:02d}.png"
            archive.writestr(name, picture.getvalue())
    return buffer.getvalue()


ARCHIVES = [archive_bytes(kind) for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)]


@cases(100)
@given(data=st.sampled_from(ARCHIVES).flatmap(damaged), extracted=st.booleans())
def test_data(few_classes: None, data: bytes, extracted: bool) -> None:
    with folder() as place:
        root = place / "omniglot-py"
        root.mkdir()
        (root / "images_background.zip").write_bytes(data)
        if extracted:
            with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(ARCHIVES[0])) as archive:
                archive.extractall(root)
            (root / "images_background/A/character01/0001_07.png").write_bytes(data[60:400])
        found = refused_or(lambda: Source("omniglot", place, place / "cache").load("background"))
        written = list((place / "cache").glob("*"))
        assert bool(written) == (found is not None)
