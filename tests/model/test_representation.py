"""Activity, dead units, KNN and the embedding, against plain versions; the script on glyphs."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from datasets.task_sampler import sample_task
from model.representation import measure, nearest_neighbours, principal_components
from tests.conftest import Call, curve, pooled
from tools import analyze_representation

PICTURES = {"ANML": {"activations", "class_gates", "embedding"}, "OML": {"activations", "embedding"}}


def plain_knn(examples: Tensor, labels: Tensor, query: Tensor, k: int) -> int:
    """Sort all examples by distance, count, and let the nearest of the winners decide."""
    distances = [math.dist(query.tolist(), example.tolist()) for example in examples]
    nearest = [int(labels[i]) for i in sorted(range(len(examples)), key=distances.__getitem__)[:k]]
    votes = Counter(nearest)
    return next(label for label in nearest if votes[label] == max(votes.values()))


@pytest.mark.parametrize(("k", "common"), [(1, 0), (2, 0), (5, 0), (5, 1), (5, 1000)])
def test_knn_is_the_plain_one(k: int, common: int) -> None:
    """With many ties, and of features that have much in common: a gate that is nearly shut, or nearly open,
    differs little from image to image."""
    generator = torch.Generator().manual_seed(k)
    size = 64 if common else 3
    features = common * torch.rand(size, generator=generator) + 0.1 * torch.randn(
        300, size, generator=generator
    )
    labels = torch.randint(6, (40,), generator=generator)  # k = 2 makes ties of two, k = 5 also 2-2-1
    found = nearest_neighbours(features[:40], labels, features[40:], k)
    assert found.tolist() == [plain_knn(features[:40], labels, query, k) for query in features[40:]]


def test_measured_on_known_activations() -> None:
    """Classes that the gate alone tells apart: two units, one for each class, opened by its gate, but for one
    test image of the first class. The last unit is active for training images alone."""
    before = torch.full((2, 20, 4), 0.5)
    before[:, 15:, 3] = 0
    gate = torch.zeros(2, 20, 4)
    gate[0, :19, 0] = gate[1, :, 1] = gate[0, 19, 1] = 1
    before += torch.linspace(0, 1e-3, 40).reshape(2, 20, 1) * (before > 0)  # no two images are equal
    before[1] = before[0]  # nor do features tell the classes
    task = sample_task([20] * 2, 2, torch.Generator().manual_seed(0), class_order="dataset", split="dataset")
    measured = measure({"before": pooled(before), "gate": pooled(gate), "after": pooled(before * gate)}, task)
    expected = {"active_before": 0.75, "active_after": 0.25, "gate_mean": 0.25, "dead": 0.5}
    assert {key: measured[key] for key in expected} == pytest.approx(expected)
    assert (measured["knn_gate"], measured["knn_after"]) == (0.9, 0.9)  # 1 where test images are the examples
    assert measured["knn_before"] == 0.5

    plain = measure({"before": pooled(before)}, task)
    assert plain == {
        "active_before": measured["active_before"],
        "dead": 0.25,
        "knn_before": measured["knn_before"],
    }


def test_principal_components_are_those_of_the_covariance() -> None:
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points *= torch.tensor([1, 5, 1, 3, 1, 1])
    projected = principal_components(points)
    values = np.linalg.eigvalsh(np.cov(points.T.numpy()))[::-1][:2]
    np.testing.assert_allclose(np.cov(projected.T.numpy()), np.diag(values), atol=1e-9)
    torch.testing.assert_close(principal_components(-points), -projected)
    assert torch.corrcoef(torch.stack([projected[:, 0], points[:, 1]]))[0, 1] > 0.9


@pytest.mark.parametrize("name", ["ANML", "OML"])
def test_script_leaves_numbers_and_pictures(
    call: Call, cache: Path, models: Path, tmp_path: Path, name: str
) -> None:
    flags = (f"--cache_dir={cache}", "--dataset=glyphs", "--test_classes=40", f"--model={models}/{name}.net")
    done = call(analyze_representation, *flags)
    folder = tmp_path / "runs/representation_0"
    content = json.loads((folder / "representation.json").read_text())
    measured = content["measured"]
    assert (content["network"], content["step"]) == (name, 0)
    assert all(0 <= value <= 1 for value in measured.values())
    assert ("knn_gate" in measured) == (name == "ANML")
    assert measured["knn_before"] > 2 / 40  # twice chance: even random features tell some classes apart
    assert {path.stem for path in folder.glob("*.png")} == PICTURES[name]
    reader = EventAccumulator(str(folder)).Reload()
    assert set(reader.Tags()["images"]) == {f"representation/{picture}" for picture in PICTURES[name]}
    (point,) = curve(folder, "representation/knn_before")
    assert point == pytest.approx((0, measured["knn_before"]))
    before = "KNN on features before the gate" if name == "ANML" else "KNN on features"
    assert f"{100 * measured['knn_before']:5.1f} %  {before}\n" in done.stdout
    if name == "ANML":
        again = call(analyze_representation, *flags)
        call(analyze_representation, *flags, "--classes=background")
        second, seen = (
            json.loads((tmp_path / f"runs/representation_{run}/representation.json").read_text())
            for run in (1, 2)
        )
        assert second["measured"] == measured != seen["measured"]
        assert (second["data"].split()[1], seen["data"].split()[1]) == ("evaluation", "background")
        assert "representation_1" in again.stdout
