"""Log-likelihoods of continuations, with what many contexts begin with computed once.

The questions of an MMLU subject share their five examples, nine tenths of every prompt. Sorted, such contexts stand
beside each other: the keys and values of the shared tokens are computed once, for a batch of one, and every question
goes on from them. The logits are taken only where a continuation is scored.

Shapes: B rows, T tokens of a row after the shared ones, K positions with logits, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lowrank_cli.errors import LowrankError

# fewer shared tokens than this are not worth a pass of their own
MIN_SHARED = 32
MAX_ROWS = {"cpu": 16, "cuda": 256}


@dataclass(frozen=True)
class Row:
    """One input of the model, and the continuations that are scored at its end.

    Attributes:
        tokens: the input; the last token of a continuation is no input.
        targets: continuations, of at least one token each, not longer than the input.
    """

    tokens: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def unscored(self) -> int:
        """Tokens at the beginning whose logits nothing needs."""
        return len(self.tokens) - max(map(len, self.targets))


@dataclass(frozen=True)
class Cluster:
    """Rows that begin with the same `shared` tokens."""

    shared: int
    rows: list[int]


def clusters(rows: Sequence[Row], min_shared: int = MIN_SHARED) -> list[Cluster]:
    """The rows in clusters, each row in one; those that share too little with others in one cluster that shares 0.

    Rows are taken in the order of their tokens. One joins the cluster before it while that saves at least as many
    tokens as the cluster did without it.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
    found: list[Cluster] = []
    alone: list[int] = []
    current, shared = [], 0

    def close() -> None:
        if len(current) > 1 and shared >= min_shared:
            found.append(Cluster(shared, list(current)))
        else:
            alone.extend(current)

    for i in order:
        if not current:
            current, shared = [i], rows[i].unscored
            continue
        common = min(shared, rows[i].unscored, common_prefix(rows[current[0]].tokens, rows[i].tokens))
        if common >= min_shared and len(current) * common >= (len(current) - 1) * shared:
            current.append(i)
            shared = common
        else:
            close()
            current, shared = [i], rows[i].unscored
    close()
    return [*found, *([Cluster(0, alone)] if alone else [])]


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return the number of tokens that two rows have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def not_numbers() -> LowrankError:
    """The error for a model whose scores are NaN."""
    return LowrankError(
        "the model's log-probabilities are not numbers", "its weights are damaged, or overflow in this --dtype"
    )


class Scorer:
    """Scores rows with a causal language model.

    Args:
        model: in eval mode, on its device.
        batch_size: rows in a pass; None for what fits: see `rows_that_fit`.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int | None):
        self.model, self.batch_size = model, batch_size
        self._limit = MAX_ROWS.get(model.device.type, 64)
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shares = self._can_share()

    def _can_share(self) -> bool:
        """Return whether the model caches keys and values of every token, so that another row can go on from them."""
        if not getattr(self.model, "_supports_cache_class", True) or self.model.config.is_encoder_decoder:
            return False
        try:
            layers = DynamicCache(config=self.model.config).layers
        except (AttributeError, KeyError, ValueError):
            return False
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """The scores of the rows, in the order in which they are computed.

        Args:
            rows: in any order.
        Yields:
            The number of a row, and for each of its continuations the sum of its tokens' log-probabilities in nats,
            taken in float32, and whether each token is the likeliest.
        """
        parts = clusters(rows) if self.shares else [Cluster(0, list(range(len(rows))))]
        for part in parts:
            cache = None
            if part.shared:
                cache = DynamicCache(config=self.model.config)
                prefix = torch.tensor([rows[part.rows[0]].tokens[: part.shared]], device=self.model.device)
                self._logits(prefix, 1, cache)
            # the longest first: what does not fit shows at once
            left = sorted(part.rows, key=lambda i: -len(rows[i].tokens))
            while left:
                batch = [rows[i] for i in left[: self._size(rows[left[0]], part.shared)]]
                try:
                    scores = self._batch(batch, part.shared, cache)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    self._limit = max(1, len(batch) // 2)
                    self.batch_size = self._limit if self.batch_size else None
                    continue
                yield from zip(left[: len(batch)], scores, strict=True)
                left = left[len(batch) :]

    def _size(self, longest: Row, shared: int) -> int:
        """Rows in the next batch."""
        if self.batch_size is not None:
            return self.batch_size
        kept = len(longest.tokens) - (longest.unscored if self._trims else 0)
        return min(self._limit, rows_that_fit(self.model, len(longest.tokens) - shared, kept, shared))

    def _batch(self, rows: list[Row], shared: int, cache: DynamicCache | None) -> list[list[tuple[float, bool]]]:
        device = self.model.device
        length = max(len(row.tokens) for row in rows) - shared
        # zeros on the right: causal attention keeps them out of everything that is scored
        padded = torch.zeros(len(rows), length, dtype=torch.long)  # (B, T)
        for i, row in enumerate(rows):
            padded[i, : len(row.tokens) - shared] = torch.tensor(row.tokens[shared:], dtype=torch.long)
        first = min(row.unscored for row in rows) - shared
        logits = self._logits(padded.to(device), length - first, self._expanded(cache, len(rows)))  # (B, K, V)
        offset = length - logits.shape[1]
        results = []
        for i, row in enumerate(rows):
            start, end = row.unscored - shared - offset, len(row.tokens) - shared - offset
            log_probs = logits[i, start:end].float().log_softmax(-1)  # (longest target, V)
            likeliest = log_probs.argmax(-1)
            scores = []
            for target in row.targets:
                tokens = torch.tensor(target, device=device)
                tail = log_probs[-len(target) :]
                total = tail.gather(1, tokens[:, None]).sum()
                scores.append((float(total), bool((likeliest[-len(target) :] == tokens).all())))
            results.append(scores)
        return results

    def _logits(self, tokens: Tensor, keep: int, cache: DynamicCache | None) -> Tensor:
        """Logits of at least the last `keep` positions: (B, T) to (B, K, V)."""
        trimmed = {"logits_to_keep": keep} if self._trims else {}
        return self.model(tokens, past_key_values=cache, use_cache=cache is not None, **trimmed).logits

    def _expanded(self, cache: DynamicCache | None, num_rows: int) -> DynamicCache | None:
        """The keys and values of one row as those of many; nothing is copied before the model appends to them."""
        if cache is None:
            return None
        copy = DynamicCache(config=self.model.config)
        for layer, kept in zip(copy.layers, cache.layers, strict=True):
            layer.lazy_initialization(kept.keys, kept.values)
            layer.keys = kept.keys.expand(num_rows, -1, -1, -1)
            layer.values = kept.values.expand(num_rows, -1, -1, -1)
        return copy


def rows_that_fit(model: PreTrainedModel, length: int, kept: int, shared: int) -> int:
    """Estimate how many rows a pass may have in a quarter of the free memory; at least 1.

    Args:
        model: decides about the sizes of logits, keys and activations.
        length: tokens of a row that are computed.
        kept: positions of a row with logits.
        shared: tokens whose keys and values are there already.
    """
    config = model.config.get_text_config(decoder=True)
    size = next(model.parameters()).element_size()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or hidden // max(1, getattr(config, "num_attention_heads", 1))
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    logits = kept * config.vocab_size * (size + 8)  # and their log-softmax in float32
    keys = (shared + length) * layers * heads * head * 2 * size * 2 if shared else 0
    activations = length * (8 * hidden + 3 * wide) * size
    return max(1, int(free_bytes(model.device) / 4 / (logits + keys + activations)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
