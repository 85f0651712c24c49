"""Spend a bit budget; knows numbers, not models."""
