"""What `lowrank compress` and `lowrank svd-dump` do: a model's singular values, and a smaller model."""
