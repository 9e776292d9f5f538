"""Text as batches of tokens: sources, tokenizers, packed and padded streams."""

from lowrank_cli.data.tokens import TextData, build

__all__ = ["TextData", "build"]
