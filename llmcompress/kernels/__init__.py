"""Arithmetic on codes."""
