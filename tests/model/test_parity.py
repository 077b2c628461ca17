"""The recorded fixtures of the released model."""

import pytest

from tests import parity
from tests.conftest import ROOT

CASES = {
    ("anml_seed0", "float64", "plain"): ".*_first|test_",
    ("anml_seed0", "float64", "fast"): ".*_second|test_head_0.0001|test_pln",
    ("anml_seed0", "float32", "fast"): ".*_first|test_head_0.0001",
    ("oml_seed2", "float64", "fast"): ".*_second",
    ("oml_seed2", "float32", "fast"): ".*_first",
}
"""By fixture, type and backend, names of the quantities that are left out: what another case compares, a
second rate of a meta-test, and the longest meta-test. `test_fast` compares both backends in all orders and
at every cut; `test_own_networks` compares updates at every cut with torch's. `python -m tests.parity`
compares everything."""


@pytest.mark.skipif(
    not (parity.find_root() / "omniglot-py").exists(), reason=f"no Omniglot in {parity.find_root()}"
)
@pytest.mark.parametrize(("name", "dtype", "backend"), CASES)
def test_fixture(name: str, dtype: str, backend: str) -> None:
    fixture, skipped = ROOT / f"tests/data/parity/{name}.npz", CASES[name, dtype, backend]
    errors = parity.compare(fixture, parity.find_root(), dtype, backend, skipped)
    assert len(errors) >= (11 if name == "anml_seed0" else 6)
    assert not {name: found for name, found in errors.items() if not found <= parity.TOLERANCE[dtype]}
