"""Architectures by name: LLaMA from 9M to 7B parameters, for pretraining. Read for `lowrank --help`: no torch here.

The sizes from 60m are those of GaLore (arXiv:2403.03507, Table 5) and its official configuration files; the smaller
ones and the 3b follow the same shape. A name counts the parameters with the papers' vocabulary of 32,000, roughly.
"""

from typing import Any

from lowrank_cli.errors import unknown

# name: hidden size, intermediate size, attention heads, layers
_SIZES = {
    "llama-9m": (128, 352, 4, 4),
    "llama-20m": (256, 688, 4, 4),
    "llama-35m": (384, 1024, 8, 6),
    "llama-40m": (416, 1024, 8, 8),
    "llama-60m": (512, 1376, 8, 8),
    "llama-71m": (512, 1368, 8, 12),
    "llama-100m": (640, 1708, 10, 12),
    "llama-130m": (768, 2048, 12, 12),
    "llama-250m": (768, 2560, 16, 24),
    "llama-350m": (1024, 2736, 16, 24),
    "llama-1b": (2048, 5461, 32, 24),
    "llama-3b": (2560, 6848, 32, 32),
    "llama-7b": (4096, 11008, 32, 32),
}


def names() -> tuple[str, ...]:
    """The name of every preset, smallest first."""
    return tuple(_SIZES)


def get(name: str) -> dict[str, Any]:
    """The Transformers configuration of a preset, as in a config.json; raises UsageError for an unknown name."""
    if name not in _SIZES:
        raise unknown("preset", name, _SIZES, "--model")
    hidden, intermediate, heads, layers = _SIZES[name]
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
