"""A model's word that it predicts the next token is not taken for it: what comes later must not reach its logits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_cli.errors import UsageError
from lowrank_cli.misfortune import explained

# tokens of a text, and how many of them stay the same while the others change
LENGTH, KEPT = 8, 4
# texts; a router that sends an early token elsewhere because of a rounding does not do so in every one of them
TEXTS = 3
# of the change at the tokens that did change; and in units of the last place, for 16 bits
TOLERANCE, ULPS = 1e-5, 8


def refuse_lookahead(model: PreTrainedModel, name: str) -> None:
    """Raise UsageError for a model whose logits at a position depend on later tokens, such as an encoder.

    Its next-token loss would be one of copying. Random tokens go through the model twice, in eval mode, with other
    last ones the second time. A mixture of experts with a capacity fills it from the first token on; whatever makes
    an early token's logits depend on later ones is no causal model.

    Args:
        model: with its weights, on any device.
        name: what to call it.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            looks_ahead = all(_looks_ahead(model, tokens) for tokens in _texts(model))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        if explained(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{name} does not give logits for {LENGTH} tokens of text: {reason}",
            "take a decoder such as llama, mistral, qwen2 or gpt2; --debug shows where it failed",
        ) from error
    finally:
        for module, was in training:
            module.training = was
    if looks_ahead:
        raise UsageError(
            f"{name} is no causal language model: its logits at a token depend on the tokens after it, as an "
            "encoder's do, so that a next-token loss or a perplexity of it means nothing",
            "train an encoder on a task with: lowrank finetune --task TASK; score the result with: lowrank eval TASK",
        )


def _texts(model: nn.Module) -> list[torch.Tensor]:
    """Pairs of texts, (2, T) each, that begin alike; without tokens that have a meaning of their own."""
    config = model.config.get_text_config()
    special = {
        value
        for part in (model.config, config)
        for key, value in part.to_dict().items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    rows = model.get_input_embeddings().num_embeddings
    plain = torch.tensor([token for token in range(min(rows, 4096)) if token not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(TEXTS):
        pair = plain[torch.randint(len(plain), (1, LENGTH), generator=generator)].repeat(2, 1)
        # every one of them another token
        steps = torch.randint(1, max(2, len(plain)), (LENGTH - KEPT,), generator=generator)
        place = torch.searchsorted(plain, pair[1, KEPT:])
        pair[1, KEPT:] = plain[(place + steps) % len(plain)]
        texts.append(pair)
    return texts


def _looks_ahead(model: nn.Module, tokens: torch.Tensor) -> bool:
    device = model.get_input_embeddings().weight.device
    # one at a time: in a batch, rows of experts are rounded together
    logits = [model(input_ids=row[None].to(device), use_cache=False)[0].double() for row in tokens]
    change = (logits[0] - logits[1]).abs()[0]  # (T, V)
    dtype = model.get_output_embeddings().weight.dtype if model.get_output_embeddings() is not None else model.dtype
    unit = torch.finfo(dtype).eps if dtype.is_floating_point else torch.finfo(torch.bfloat16).eps
    return bool(change[:KEPT].max() > max(TOLERANCE, ULPS * unit) * change[KEPT:].max())
