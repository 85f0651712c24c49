"""Blocks that share one stored weight, with low-rank corrections of their own (recursive tying)."""
