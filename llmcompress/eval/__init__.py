"""Is it still good? The judge shares no code with the accused: nothing here imports `compress`."""
