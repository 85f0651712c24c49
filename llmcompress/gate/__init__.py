"""Limits and statistics that turn a report into a verdict. Reads report.json; needs no torch."""
