"""A compressed model that runs; light to import."""
