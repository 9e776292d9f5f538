"""Models by their shapes, with random weights."""

from typing import Protocol

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Shape(Protocol):
    """What a bench says of its model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


def random_llama(shape: Shape) -> LlamaForCausalLM:
    """A LLaMA with tied embeddings, the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()
