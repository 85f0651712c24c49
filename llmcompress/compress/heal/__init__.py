"""Recover quality of a pruned or quantized checkpoint: a few weights are trained to give the original's answers."""
