"""Modules without networks and data: flags, run folders, files, checkpoints, processes, errors."""
