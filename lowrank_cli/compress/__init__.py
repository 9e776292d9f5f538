"""Compress a model (`lowrank compress`), and write the singular values of its weights (`lowrank svd-dump`)."""
