"""Blocks of a network that only some rows of a call run."""
