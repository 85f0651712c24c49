"""A checkpoint of ours written once more, in a format that other programs read."""
