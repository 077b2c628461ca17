"""Programs beside the two scripts: `python -m tools.NAME --help`."""

import anml_start  # noqa: F401 (before torch, which the programs import)
