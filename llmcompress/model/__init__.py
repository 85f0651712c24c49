"""A big model, a block at a time."""
