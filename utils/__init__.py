"""What the scripts share beside networks and data: arguments, run folders, checkpoints, plots."""
