"""Generated characters: the same for the same seed, and like Omniglot's."""

from pathlib import Path

import numpy as np
import pytest

from datasets import Source, glyphs
from datasets.images import ImageSet
from datasets.omniglot import CLASSES


def test_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(cache: str = "cache", seed: int = 0) -> ImageSet:
        return Source("glyphs", tmp_path, tmp_path / cache, {"glyph_seed": seed}).load("background")

    monkeypatch.setitem(CLASSES, "background", 30)
    first = load()
    assert first.images.shape == (30 * 20, 1, 28, 28)
    assert load("new").data_hash == first.data_hash
    assert load(seed=1).data_hash != first.data_hash == load().data_hash
    monkeypatch.undo()
    background, evaluation = glyphs.names("background"), glyphs.names("evaluation")
    for names, classes, alphabets in ((background, 964, 30), (evaluation, 659, 20)):
        assert list(names) == sorted(set(names))
        assert (len(names), len({name.partition("/")[0] for name in names})) == (classes, alphabets)
    assert not set(background) & set(evaluation)


def test_glyphs_look_like_omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "background", 60)
    monkeypatch.setitem(glyphs.ALPHABETS, "background", 2)
    drawn = Source("glyphs", tmp_path, tmp_path).load("background").images
    images = drawn.reshape(60, 20, 28, 28).numpy().astype(np.float64) / 255
    assert len(np.unique(images.reshape(60 * 20, -1), axis=0)) == 60 * 20
    assert 0.90 < images.mean() < 0.94, "Omniglot: 0.92"
    assert 0.21 < images.std() < 0.27, "Omniglot: 0.24"
    assert images[..., [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.99, "ink is dark, paper white"

    train, test = images[:, :15].reshape(900, -1), images[:, 15:].reshape(300, -1)
    distance = (train**2).sum(1) - 2 * test @ train.T
    right = distance.argmin(1) // 15 == np.arange(300) // 5
    assert 0.3 < right.mean() < 0.65, "nearest neighbour on Omniglot, 50 classes: 0.50"
