"""The training loss of a causal language model, without its logits where the architecture allows that."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_cli.models.head import head_input, tail_of
from lowrank_cli.ops.loss import chunked_cross_entropy
from lowrank_cli.ops.loss import num_targets as count_targets
from lowrank_cli.ops.precision import wide


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor], num_targets: int | Tensor | None = None) -> Tensor:
    """Next-token cross-entropy of a batch: the model's own `model(**batch).loss`, in less memory where it can be.

    A model with an untouched linear head, whose logits are at most scaled and soft-capped, never holds the
    tokens x vocabulary logits; any other (a head that a method has replaced, a wrapped model) computes its logits as
    usual. The balancing loss of a mixture of experts is not part of it.

    Args:
        model: a causal language model.
        batch: what the model takes: input_ids (B, T), labels (B, T), not shifted, -100 for no target, and as needed
            attention_mask and position_ids.
        num_targets: divides the sum instead of the batch's own number of targets, see `chunked_cross_entropy`.
    Returns:
        A float32 scalar (float64 for float64 weights).
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if hasattr(model, "loss_in_chunks"):
        # one whose weights are cut over processes
        return model.loss_in_chunks(inputs, labels, num_targets)
    if takes_chunked_path(model):
        return chunked_loss(model, inputs, labels, num_targets)
    logits = model(**inputs, use_cache=False)[0]  # (B, T, V)
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
    total = F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="sum")
    divisor = count_targets(labels) if num_targets is None else num_targets
    return total / torch.as_tensor(divisor, device=total.device).clamp(min=1)


def chunked_loss(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, num_targets: int | Tensor | None
) -> Tensor:
    """The loss of a model that `takes_chunked_path`."""
    tail, head = tail_of(model), model.get_output_embeddings()
    return chunked_cross_entropy(
        head_input(model, inputs),
        head.weight,
        labels,
        bias=head.bias,
        scale=tail.scale,
        cap=tail.cap,
        num_targets=num_targets,
    )


def takes_chunked_path(model: nn.Module) -> bool:
    """Return whether the loss of this model is computed in chunks, without holding all of its logits.

    The answer for a model on the meta device is that for the same one with weights.
    """
    if tail_of(model) is None:
        return False
    head = model.get_output_embeddings()
    # an adapter, a parametrization or a quantized head is another class
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
