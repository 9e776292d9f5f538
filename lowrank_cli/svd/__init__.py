"""Singular values of a model's linears, and how many of their directions to keep."""
