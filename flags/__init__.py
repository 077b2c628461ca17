"""The flags of the three scripts; those of a tool stand in its own file."""
