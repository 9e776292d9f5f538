"""A head and an embedding that share their weight, and what is merged into one of them only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def apart(net: PreTrainedModel) -> Iterator[None]:
    """Give a head and an embedding that are tied weights of their own; they share one again at the end if those are
    still the same.

    A low-rank update beside the head is the head's alone: merged into a shared weight it would change the embedding
    too. A model whose weights differ then says so in its configuration.
    """
    shared = net.get_input_embeddings().weight
    holders = [(m, name) for m in net.modules() for name, p in m._parameters.items() if p is shared]
    for module, name in holders[1:]:
        setattr(module, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    yield
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    if len(holders) < 2 or head is None:
        return
    tied = torch.equal(head.weight, embedding.weight)
    if tied:
        head.weight = embedding.weight
    else:
        net.all_tied_weights_keys = {}
    for config in (net.config, net.config.get_text_config()):
        config.tie_word_embeddings = tied
