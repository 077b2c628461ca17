"""`--learner iid`: its batches and steps are right, and it learns."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from datasets.task_sampler import shuffled_batches
from model.modelfactory import build
from model.outer_loops import BatchLoop
from tests.conftest import Trainer, pooled, rows
from utils.errors import UserError
from utils.files import load_checkpoint

TINY = "--learner=iid --dataset=glyphs --pln_channels=6 --train_classes=5 --num_classes=8 --threads=1"


@pytest.mark.parametrize("batch_size", [6, 20, 7, 48])
def test_batches_take_every_image_once_before_any_twice(batch_size: int) -> None:
    batches = list(islice(shuffled_batches([5] * 4, 3, batch_size=batch_size), 20))
    drawn = torch.cat(batches)
    numbers = (drawn[:, 0] * 5 + drawn[:, 1]).tolist()
    passes = [numbers[start : start + 20] for start in range(0, len(numbers) - 19, 20)]
    assert all(sorted(seen) == list(range(20)) for seen in passes)
    assert len({tuple(seen) for seen in passes}) == len(passes)
    later = islice(shuffled_batches([5] * 4, 3, batch_size=batch_size, skip=9), 11)
    assert all(map(torch.equal, later, batches[9:]))


def test_a_step_is_that_of_torch() -> None:
    widths = {"pln_channels": 4, "num_classes": 6}
    net, other = (build("OML", widths, torch.Generator().manual_seed(0)) for _ in range(2))
    images, index = torch.randn(6, 3, 1, 28, 28), torch.tensor([[0, 1], [1, 0], [2, 2], [5, 1], [0, 2]])
    ours = BatchLoop(net, pooled(images), torch.Generator(), meta_lr=0.001, batch_size=5)
    theirs = torch.optim.Adam(other.parameters(), 0.001)
    for _ in range(3):
        step = ours.differentiate(index)
        ours.update()
        theirs.zero_grad()
        logits = other(images[index[:, 0], index[:, 1]])
        loss = torch.nn.functional.cross_entropy(logits, index[:, 0])
        loss.backward()
        theirs.step()
        right = (logits.argmax(1) == index[:, 0]).float().mean()
        torch.testing.assert_close(tuple(step.values()), (loss.detach(), right))
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def test_it_learns_until_it_diverges(trainer: Trainer) -> None:
    trainer.flags = [*TINY.split(), "--name=smoke", trainer.flags[-1]]
    trainer("--steps=100", "--batch_size=20", "--meta_lr=0.01")
    accuracies = [float(row["accuracy"]) for row in rows(trainer.run)]
    assert accuracies[0] < 0.5 < 0.8 < sum(accuracies[-20:]) / 20
    saved = load_checkpoint(Path("Pretrain_Model.net"))
    assert (saved.network, saved.step, saved.arguments["weights"]) == ("OML", 100, "pretrained")
    with pytest.raises(UserError, match=r"^step 2: .* with --meta_lr 1e\+30 --seed 9; lower it; the state"):
        trainer("--checkpoint", "--saved_model=Pretrain_Model.net", "--steps=9", "--meta_lr=1e30")
    assert load_checkpoint(Path("Pretrain_Model.net")).step == 1
