"""The craft: scoring, allocation, rounding, writing."""
