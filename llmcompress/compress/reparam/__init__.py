"""Rewrites that keep the model's function, one per file: `SCOPE`, and `rewrite(subject, options) -> Rewritten`."""
