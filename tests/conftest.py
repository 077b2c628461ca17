"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of generated characters for all runs of the session: drawing them takes seconds."""
    return tmp_path_factory.mktemp("cache")
