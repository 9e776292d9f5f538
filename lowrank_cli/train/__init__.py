"""Training: one loop for every command and method."""
