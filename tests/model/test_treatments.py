"""The table of treatments: each row trains what the paper says, and a preset stands for its row."""

import re
from pathlib import Path

import pytest

from model.modelfactory import NETWORKS, trained_parameters
from model.treatments import TABLE, describe
from tests.utils.test_arguments import evaluate
from utils.errors import UserError

NM = [
    f"nm.{layer}.{kind}"
    for n in (1, 2, 3)
    for layer in (f"block{n}.conv", f"block{n}.norm")
    for kind in ("weight", "bias")
]
GATE = ["nm.gate.weight", "nm.gate.bias"]
PLN = [name.replace("nm.", "pln.", 1) for name in NM]
HEAD = ["head.weight", "head.bias"]
CONVOLUTIONS = [f"body.conv{n}.{kind}" for n in range(1, 7) for kind in ("weight", "bias")]
HIDDEN = ["body.linear.weight", "body.linear.bias"]

# (treatment, network, --rln, what learns, and from which weights), as the paper has them.
PAPER = [
    ("ANML", "ANML", 13, HEAD, "meta-trained"),
    ("ANML-FT:PLN", "ANML", 7, PLN + HEAD, "meta-trained"),
    ("ANML-FT:PLN+NM-out", "ANML", 6, GATE + PLN + HEAD, "meta-trained"),
    ("ANML-Unlimited", "ANML", 0, NM + GATE + PLN + HEAD, "meta-trained"),
    ("sANML", "sANML", 6, HEAD, "meta-trained"),
    ("OML", "OML", 6, HIDDEN + HEAD, "meta-trained"),
    ("OML-OLFT", "OML", 7, HEAD, "meta-trained"),
    ("OML-Unlimited", "OML", 0, CONVOLUTIONS + HIDDEN + HEAD, "meta-trained"),
    ("Pretrain", "OML", 6, HIDDEN + HEAD, "pretrained"),
    ("Scratch", "ANML", 0, NM + GATE + PLN + HEAD, "random"),
    ("Scratch", "OML", 0, CONVOLUTIONS + HIDDEN + HEAD, "random"),
]


@pytest.mark.parametrize(("name", "network", "rln", "trained", "weights"), PAPER)
def test_each_row_trains_what_the_paper_says(
    name: str, network: str, rln: int, trained: list[str], weights: str
) -> None:
    row = TABLE[name]
    assert (row.rln, row.weights, row.iid) == (rln, weights, False)
    assert row.network in (network, None)
    net = NETWORKS[network](pln_channels=2, num_classes=3)
    assert trained_parameters(net, row.rln) == trained


def test_every_treatment_has_its_oracle() -> None:
    assert {name.removesuffix("-Oracle") for name in TABLE} == {row[0] for row in PAPER}
    assert len(TABLE) == 20
    for name in {row[0] for row in PAPER}:
        plain, oracle = TABLE[name], TABLE[f"{name}-Oracle"]
        assert (oracle.network, oracle.weights, oracle.rln) == (plain.network, plain.weights, plain.rln)
        assert oracle.iid


def test_other_combinations_have_names_of_their_own() -> None:
    names = [
        describe(network, weights, rln, iid=iid, epochs=epochs, reset=reset)
        for network in ("ANML", "OML")
        for weights in ("meta-trained", "pretrained")
        for rln in range(1, 8)
        for iid in (False, True)
        for epochs in (1, 2)
        for reset in (False, True)
    ]
    assert len(set(names)) == len(names)
    assert describe("ANML", "meta-trained", 9) == "ANML --rln 9"
    assert describe("ANML", "pretrained", 13) == "ANML (pretrained) --rln 13"
    # Without frozen layers nothing of the weights is left.
    assert describe("OML", "pretrained", 0, reset=True) == "Scratch"


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_sets_the_flags(name: str) -> None:
    row = TABLE[name]
    arguments = evaluate(f"--model m --treatment-preset {name.lower()}")
    given = (arguments.rln, arguments.scratch, arguments.iid, arguments.epoch)
    assert given == (row.rln, row.scratch, row.iid, 1)
    assert arguments.treatment_preset == name
    # Flags that say the same are no contradiction.
    iid = "--iid" if row.iid else "--no-iid"
    assert evaluate(f"--model m --treatment-preset {name} --rln {row.rln} {iid} --epoch 1") == arguments


def test_only_oracles_may_pass_the_stream_often() -> None:
    assert evaluate("--treatment-preset Scratch-Oracle --epoch 20").epoch == 20
    assert evaluate("--treatment-preset Scratch").treatment == "ANML"
    assert evaluate("--treatment-preset Scratch --treatment OML").treatment == "OML"


def test_a_config_file_names_models_and_presets(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = ["a, b.net", "c.net"]\ntreatment_preset = "oml"\nschedule = 5\n')
    arguments = evaluate(f"--config {file}")
    assert arguments.model == [Path("a, b.net"), Path("c.net")]
    assert (arguments.treatment_preset, arguments.rln, arguments.schedule) == ("OML", 6, [5])
    file.write_text("model = [true]\n")
    with pytest.raises(UserError, match="model: True is no number and no text"):
        evaluate(f"--config {file}")


def test_the_docs_say_the_same() -> None:
    """Wherever a row of a table of docs/reproduce.md names treatments and `--rln`, they belong together."""
    text = (Path(__file__).parents[2] / "docs/reproduce.md").read_text()
    said: dict[str, int] = {}
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        names = re.sub(r"NM out", "NM-out", cells[0]).split(", ")
        numbers = re.findall(r"--rln (\d+)", line)
        if numbers and set(names) <= TABLE.keys():
            assert len(names) == len(numbers), line
            said |= dict(zip(names, map(int, numbers), strict=True))
    assert {"ANML", "ANML-FT:PLN", "ANML-FT:PLN+NM-out", "ANML-Unlimited", "OML", "OML-OLFT"} <= said.keys()
    assert said == {name: TABLE[name].rln for name in said}
