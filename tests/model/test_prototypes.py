"""Meta-training for heads without gradient: the logits by hand, and what images become."""

import pytest
import torch

from datasets.task_sampler import distort, show
from model.learner import GEMCL_SCORES, gemcl_logits
from model.outer_loops import prototype_logits
from tests.reference import log_density


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("head", ["distances", *GEMCL_SCORES])
def test_logits_are_distances_to_means_or_log_densities(head: str, leave_one_out: bool) -> None:
    """An image's own class leaves it out; the variances of all classes are as likely as of equally many."""
    features = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shots, learned, prior = None if leave_one_out else 3, 4 if leave_one_out else 3, (1.5, 0.7)
    expected = []
    for k, of_class in enumerate(features):
        for i in range(5 if leave_one_out else 2):
            images = [other if leave_one_out else other[:3] for other in features]
            if leave_one_out:
                images[k] = torch.cat([of_class[:i], of_class[i + 1 :]])
            query = of_class[i if leave_one_out else 3 + i]
            if head == "distances":
                values = [-((query - known.mean(0)) ** 2).sum() / 7**0.5 for known in images]
            else:
                values = [log_density(head, query, known, prior, learned) for known in images]
            expected.append(torch.stack(values))
    if head == "distances":
        logits = prototype_logits(features, shots)
    else:
        numbers = dict(zip(("shape", "scale"), torch.tensor(prior, dtype=torch.float64), strict=True))
        logits = gemcl_logits(features, shots, GEMCL_SCORES[head], **numbers)
        logits = logits - (logits[0, 0] - expected[0][0])
    torch.testing.assert_close(logits, torch.stack(expected))


def test_symmetries_are_quarter_turns_and_mirrored_quarter_turns() -> None:
    drawings = torch.arange(8 * 2 * 9.0).view(8, 2, 1, 3, 3)
    for k, (image, shown) in enumerate(zip(drawings, show(drawings, torch.arange(8)), strict=True)):
        assert torch.equal(shown, (image.flip(-1) if k & 4 else image).rot90(k & 3, (-2, -1)))


def test_distortions_leave_half_alone_and_keep_what_is_on_the_image() -> None:
    paper = torch.zeros(200, 1, 28, 28)
    paper[:, :, 12:16, 12:16] = 1
    drawn = distort(paper, torch.Generator().manual_seed(0), 1)
    alone = (drawn == paper).flatten(1).all(1)
    assert 70 < int(alone.sum()) < 130
    assert drawn.sum((1, 2, 3)).sub(16).abs().max() < 6  # stretched by 15 % each way at most
    assert torch.equal(distort(paper, torch.Generator().manual_seed(0), 0), paper)
