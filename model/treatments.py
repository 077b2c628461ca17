"""The treatments of the paper's meta-test, one row each: which network, whose weights, what learns.

`--treatment-preset NAME` sets the flags of a row; an evaluation without it is named by its row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Weights = Literal["meta-trained", "pretrained", "random"]
"""What made the weights: meta-training, pretraining, or the random initial values alone."""


@dataclass(frozen=True)
class Treatment:
    """One row of the table.

    Attributes:
        name: as the paper calls it.
        network: entry of `modelfactory.NETWORKS`; None for any.
        weights: what meta-test starts from. Random weights are drawn anew for each run; of other weights the
            head alone is.
        rln: layers frozen at meta-test; see `modelfactory.trained_parameters`.
        trained: what learns at meta-test, in words.
        iid: the stream is shuffled (an Oracle) instead of class after class. The paper's Oracles pass over
            the stream 1 or 20 times, all others once.
    """

    name: str
    network: str | None
    weights: Weights
    rln: int
    trained: str
    iid: bool = False

    @property
    def scratch(self) -> bool:
        """Whether every trained layer starts from random weights."""
        return self.weights == "random"


# Paper, section 4 and its supplement. Pretrain is its Pretrain & Transfer.
_SEQUENTIAL = (
    Treatment("ANML", "ANML", "meta-trained", 13, "head"),
    Treatment("ANML-FT:PLN", "ANML", "meta-trained", 7, "all of the prediction network"),
    Treatment("ANML-FT:PLN+NM-out", "ANML", "meta-trained", 6, "that and the gate's layer"),
    Treatment("ANML-Unlimited", "ANML", "meta-trained", 0, "everything"),
    Treatment("sANML", "sANML", "meta-trained", 6, "head"),
    Treatment("OML", "OML", "meta-trained", 6, "both linear layers"),
    Treatment("OML-OLFT", "OML", "meta-trained", 7, "last linear layer"),
    Treatment("OML-Unlimited", "OML", "meta-trained", 0, "everything"),
    Treatment("Pretrain", "OML", "pretrained", 6, "both linear layers"),
    Treatment("Scratch", None, "random", 0, "everything"),
)
TABLE: dict[str, Treatment] = {row.name: row for row in _SEQUENTIAL} | {
    f"{row.name}-Oracle": replace(row, name=f"{row.name}-Oracle", iid=True) for row in _SEQUENTIAL
}
"""All treatments by name; `<name>-Oracle` is the same on a shuffled stream."""


def describe(
    network: str,
    weights: Weights,
    rln: int,
    *,
    iid: bool = False,
    epochs: int = 1,
    reset: bool = False,
    optimizer: str = "adam",
    learner: str = "",
) -> str:
    """The name of what an evaluation does; different treatments have different names.

    It is the name of a row of the table, `-Oracle` included, followed by the number of passes where that is
    not one. A treatment without a row is spelled out: `ANML --rln 9`.

    Args:
        network, weights, rln, iid: see :class:`Treatment`.
        epochs: passes over the stream.
        reset: whether every trained layer starts anew, in place of the head alone.
        optimizer: what takes the steps at meta-test; the name leaves Adam out.
        learner: what learns without steps, see `model.learner.LearnerKind.describe`; empty for an optimizer.
    """
    if reset and rln == 0:  # then no weights of the training are left
        weights, reset = "random", False
    kind = "" if weights == "meta-trained" else f" ({weights})"
    alike = [row for row in _SEQUENTIAL if (row.weights, row.rln) == (weights, rln)]
    named = [row.name for row in alike if row.network in (network, None)]
    name = named[0] if named else f"{network}{kind} --rln {rln}"
    if reset:
        name += " --reset"
    if iid:
        name += "-Oracle"
    if epochs > 1:
        name += f", {epochs} epochs"
    if optimizer != "adam":
        name += f", {optimizer.upper()}"
    return f"{name}, {learner}" if learner else name
