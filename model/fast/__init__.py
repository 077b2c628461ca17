"""Layers for the CPU with the numbers of their plain twins up to rounding."""
