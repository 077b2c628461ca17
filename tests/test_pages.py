"""README.md and docs/: what they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A link or an image, relative to its page; a path in code quotes, relative to the root.
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
QUOTED = re.compile(r"`((?:configs|datasets|docs|model|pretrained|results|tests|tools|utils)/[\w./-]*)`")
TO_WRITE = {"datasets/arrays.py"}  # the reader's own, in docs/data.md


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / link for link in LINK.findall(text)]
    quoted = [ROOT / path for path in {*QUOTED.findall(text)} - TO_WRITE]
    assert [str(path) for path in linked + quoted if not path.exists()] == []
