"""The treatments of the paper's meta-test: for each its network, weights and trained layers.

`--treatment-preset NAME` sets the flags of a treatment. Any evaluation is named after its treatment.
"""

from dataclasses import dataclass, replace
from typing import Literal

Weights = Literal["meta-trained", "pretrained", "random"]
"""The origin of the weights: meta-training, pretraining, or random initialisation."""


@dataclass(frozen=True)
class Treatment:
    """One treatment, a row of `TABLE`.

    Attributes:
        name: as the paper calls it.
        network: entry of `modelfactory.NETWORKS`; None for any.
        weights: the weights at the start of meta-test. For each run, random weights are drawn anew; of other
            weights, the head alone.
        rln: layers frozen at meta-test; see `modelfactory.trained_parameters`.
        iid: the stream is shuffled (an Oracle) instead of class after class. The paper's Oracles pass over
            the stream 1 or 20 times, all others once.
    """

    name: str
    network: str | None
    weights: Weights
    rln: int
    iid: bool = False

    @property
    def scratch(self) -> bool:
        """Whether every trained layer starts from random weights."""
        return self.weights == "random"


# Paper, section 4 and supplement; Pretrain is the paper's Pretrain & Transfer.
_SEQUENTIAL = (
    Treatment("ANML", "ANML", "meta-trained", 13),
    Treatment("ANML-FT:PLN", "ANML", "meta-trained", 7),
    Treatment("ANML-FT:PLN+NM-out", "ANML", "meta-trained", 6),
    Treatment("ANML-Unlimited", "ANML", "meta-trained", 0),
    Treatment("sANML", "sANML", "meta-trained", 6),
    Treatment("OML", "OML", "meta-trained", 6),
    Treatment("OML-OLFT", "OML", "meta-trained", 7),
    Treatment("OML-Unlimited", "OML", "meta-trained", 0),
    Treatment("Pretrain", "OML", "pretrained", 6),
    Treatment("Scratch", None, "random", 0),
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
    learner: str = "",
) -> str:
    """The name of an evaluation's treatment, unique to the treatment.

    The name is that of a row of the table, `-Oracle` included, followed by the number of passes if more than
    one. A treatment without a row is spelled out: `ANML --rln 9`.

    Args:
        network, weights, rln, iid: see :class:`Treatment`.
        epochs: passes over the stream.
        reset: whether every trained layer starts anew, in place of the head alone.
        learner: what learns, see `model.learner.LearnerKind.describe`; empty for the paper's learner.
    """
    if reset and rln == 0:  # no trained weights remain
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
    return f"{name}, {learner}" if learner else name
