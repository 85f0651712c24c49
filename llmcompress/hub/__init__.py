"""The Hub: a model by its word, cards as the Hub reads them, an output pushed in one commit."""
