"""Models: presets, loading, the linears that methods target, and the training loss."""
