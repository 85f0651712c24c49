"""Drop whole blocks: rank them, measure what removing them costs, write the model without them."""
