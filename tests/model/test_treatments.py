"""The table of treatments: each row trains what the paper says, and a preset stands for its row."""

import re
from pathlib import Path

import pytest

from model.modelfactory import NETWORKS, trained_parameters
from model.treatments import TABLE, describe
from tests.utils.test_arguments import evaluate

# As in the paper: treatment, network, --rln, beginnings of the names of what learns, origin of the weights.
PAPER = [
    ("ANML", "ANML", 13, "head", "meta-trained"),
    ("ANML-FT:PLN", "ANML", 7, "pln head", "meta-trained"),
    ("ANML-FT:PLN+NM-out", "ANML", 6, "nm.gate pln head", "meta-trained"),
    ("ANML-Unlimited", "ANML", 0, "nm pln head", "meta-trained"),
    ("sANML", "sANML", 6, "head", "meta-trained"),
    ("OML", "OML", 6, "body.linear head", "meta-trained"),
    ("OML-OLFT", "OML", 7, "head", "meta-trained"),
    ("OML-Unlimited", "OML", 0, "body head", "meta-trained"),
    ("Pretrain", "OML", 6, "body.linear head", "pretrained"),
    ("Scratch", "ANML", 0, "nm pln head", "random"),
    ("Scratch", "OML", 0, "body head", "random"),
]


@pytest.mark.parametrize(("name", "network", "rln", "trained", "weights"), PAPER)
def test_each_row_trains_what_the_paper_says(
    name: str, network: str, rln: int, trained: str, weights: str
) -> None:
    """So does its Oracle, whose images are shuffled."""
    net = NETWORKS[network](pln_channels=2, num_classes=3)
    names = [key for key, _ in net.named_parameters() if key.startswith(tuple(trained.split()))]
    assert trained_parameters(net, rln) == names
    for iid, row in enumerate((TABLE[name], TABLE[f"{name}-Oracle"])):
        assert (row.rln, row.weights, row.iid) == (rln, weights, iid)
        assert row.network in (network, None)
    assert len(TABLE) == 2 * len({row[0] for row in PAPER})


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


def test_a_preset_sets_the_flags() -> None:
    for name, row in TABLE.items():
        arguments = evaluate(f"--model m --treatment-preset {name.lower()}")
        given = (arguments.treatment_preset, arguments.rln, arguments.scratch, arguments.iid, arguments.epoch)
        assert given == (name, row.rln, row.scratch, row.iid, 1)
        # Flags that say the same are no contradiction.
        iid = "--iid" if row.iid else "--no-iid"
        assert evaluate(f"--model m --treatment-preset {name} --rln {row.rln} {iid} --epoch 1") == arguments
    assert evaluate("--treatment-preset Scratch-Oracle --epoch 20").epoch == 20
    assert evaluate("--treatment-preset Scratch").treatment == "ANML"
    assert evaluate("--treatment-preset Scratch --treatment OML").treatment == "OML"


def test_a_config_file_names_models_and_presets(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = ["a, b.net", "c.net"]\ntreatment_preset = "oml"\nschedule = 5\n')
    arguments = evaluate(f"--config {file}")
    assert arguments.model == [Path("a, b.net"), Path("c.net")]
    assert (arguments.treatment_preset, arguments.rln, arguments.schedule) == ("OML", 6, [5])


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
