"""What rewrites that keep a model's function share: sites found by trace, edits, and the check in float64."""
