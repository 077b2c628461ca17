"""Programs around the scripts: `python -m tools.NAME --help`."""
