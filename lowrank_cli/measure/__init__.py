"""Measure a model for the training loop, `compress` and `eval`: perplexity, classification and answers."""
