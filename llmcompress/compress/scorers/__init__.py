"""Importance measures, one per file: `score(job) -> Scores`."""
