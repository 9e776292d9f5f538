"""What a model is measured with, by the training loop, by `compress` and by `eval`."""
