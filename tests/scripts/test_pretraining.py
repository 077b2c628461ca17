"""Supervised training of all classes: it learns, leaves what meta-training leaves, and loses nothing."""

from __future__ import annotations

import json
import logging
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain_classification
from datasets.task_sampler import shuffled_batches
from flags.pretraining import Pretraining
from model.modelfactory import build
from model.optimizer import Adam
from model.supervised import Batch, supervised_step
from tests.conftest import assert_same_run, curve, rows
from utils.checkpoint import load_checkpoint
from utils.command_line import parse
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = "--dataset glyphs --pln_channels 6 --train_classes 5 --num_classes 8 --threads 1"


def pretrain(flags: str, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(logging.getLogger("anml"), "handlers", [])  # the script's goes with the test
    monkeypatch.setattr(sys, "argv", ["pretrain_classification.py", *flags.split(), f"--cache_dir={cache}"])
    pretrain_classification.main()


def test_the_default_is_what_meta_training_sees() -> None:
    arguments = parse(Pretraining, [])
    assert arguments.images == 20000 * (20 + 64)
    assert (arguments.treatment, arguments.train_classes) == ("OML", None)
    assert arguments.model_name == Path("Pretrain_Model.net")


@pytest.mark.parametrize(("total", "batch_size"), [(20, 6), (19, 20), (100, 7), (3, 8)])
def test_batches_take_every_image_once_before_any_twice(total: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = list(shuffled_batches([5] * 4, generator, total=total, batch_size=batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    drawn = torch.cat(batches)
    assert len(drawn) == total
    numbers = (drawn[:, 0] * 5 + drawn[:, 1]).tolist()
    for start in range(0, total, 20):
        passed = numbers[start : start + 20]
        assert len(set(passed)) == len(passed)
        assert set(passed) <= set(range(20))
    assert total < 20 or numbers[:20] != sorted(numbers[:20])


@pytest.mark.parametrize("kind", ["ANML", "OML"])
def test_a_step_is_that_of_torch(kind: str) -> None:
    net, other = (
        build(kind, {"pln_channels": 4, "num_classes": 6}, torch.Generator().manual_seed(0)) for _ in range(2)
    )
    images, labels = torch.randn(7, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    ours, theirs = Adam(net.parameters(), 0.001), torch.optim.Adam(other.parameters(), 0.001)
    for _ in range(3):
        batch = supervised_step(net, ours, images, labels)
        theirs.zero_grad()
        logits = other(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        theirs.step()
        torch.testing.assert_close(batch.loss, loss.detach())
        assert batch.accuracy == (logits.argmax(1) == labels).double().mean()
    for name, weight in net.named_parameters():
        if kind == "OML" or not name.endswith("bias") or "conv" not in name:
            torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_it_learns_and_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(f"{TINY} --images 2005 --batch_size 20 --lr 0.01 --log_every 25", cache, tmp_path, monkeypatch)
    folder = tmp_path / "runs/pretrain_0"
    found = rows(folder)
    assert len(found) == 101
    assert int(found[-1]["images"]) == 2005
    assert sum(float(row["accuracy"]) for row in found[-20:]) / 20 > 0.8
    assert float(found[0]["accuracy"]) < 0.5
    saved = load_checkpoint(tmp_path / "Pretrain_Model.net")
    assert (saved.network, saved.step, saved.arguments["weights"]) == ("OML", 101, "pretrained")
    again = load_checkpoint(folder / "model.net")
    assert all(torch.equal(saved.state_dict[name], again.state_dict[name]) for name in saved.state_dict)
    assert len(json.loads((folder / "config.json").read_text())["data_hash"]) == 64
    assert [step for step, _ in curve(folder, "pretrain/loss")] == list(range(1, 102))
    assert len(curve(folder, "pretrain/images_per_second")) == 5


def test_a_rate_too_high_keeps_the_last_good_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(f"{TINY} --images 40", cache, tmp_path, monkeypatch)
    before = (tmp_path / "Pretrain_Model.net").read_bytes()
    with pytest.raises(UserError, match="lower --lr"):
        pretrain(f"{TINY} --images 840 --lr 1e30", cache, tmp_path, monkeypatch)
    assert (tmp_path / "Pretrain_Model.net").read_bytes() == before


def test_what_was_interrupted_goes_on_bit_for_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 33 images lie across passes of 100; the crash costs the steps since the last state."""
    flags = f"{TINY} --images 1000 --batch_size 33 --save_every 4 --log_every 5"
    pretrain(flags, cache, tmp_path, monkeypatch)
    calls = count(1)

    def step(*batch: Any) -> Batch:
        call = next(calls)
        if call == 6:
            signal.raise_signal(signal.SIGTERM)
        if call == 13:
            raise RuntimeError("a crash")
        return supervised_step(*batch)

    monkeypatch.setattr(pretrain_classification, "supervised_step", step)
    with pytest.raises(SystemExit) as ended:
        pretrain(flags, cache, tmp_path, monkeypatch)
    assert ended.value.code == 143
    resume = "--resume runs/pretrain_1"
    with pytest.raises(RuntimeError, match="a crash"):
        pretrain(resume, cache, tmp_path, monkeypatch)
    pretrain(resume, cache, tmp_path, monkeypatch)
    runs = tmp_path / "runs"
    assert_same_run(runs / "pretrain_0", runs / "pretrain_1")
    config = json.loads((runs / "pretrain_1/config.json").read_text())
    assert [entry["step"] for entry in config["resumed"]] == [6, 12]
    assert rows(runs / "pretrain_1")[-1]["images"] == "1000"
