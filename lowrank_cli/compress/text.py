"""The text that a compression is calibrated on and measured with, as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_cli.config import DataConfig
from lowrank_cli.data.documents import open_source
from lowrank_cli.data.rows import Encoder, RowReader
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.models import load as models
from lowrank_cli.models.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# tokens in a window
LENGTH = 512
# sequences in a forward pass
BATCH = 4


def text_of_run(location: str) -> DataConfig | None:
    """The text that a run was trained on and the length of its windows, if the weights are in a run folder."""
    from lowrank_cli.foreign import read_yaml

    for folder in (Path(location).parent, Path(location).parent.parent):
        if (folder / "run.json").is_file() and (folder / "config.yaml").is_file():
            settings = read_yaml(folder / "config.yaml")
            keys = ("dataset", "dataset_config", "validation_dataset", "text_field", "max_length")
            found = {key: settings[key] for key in keys if settings.get(key) is not None}
            return DataConfig(**found) if settings.get("command") == "pretrain" else None
    return None


def tokenizer_for(source: Source, model: PreTrainedModel, offline: bool, *, needed: bool) -> Any:
    """The tokenizer beside the weights; None if there is none of this model and nobody needs it."""
    place = source.name if source.gguf else source.location
    try:
        tokenizer = named_tokenizer(place, offline=offline)
        models.check_vocabulary(model, tokenizer)
    except LowrankError:
        if needed:
            raise
        return None
    return tokenizer


def window_length(config: PretrainedConfig, asked: int | None, own: DataConfig | None) -> int:
    """Tokens in a window: what was asked for, else the run's own, else LENGTH; no more than the model has positions.

    Args:
        config: the model's.
        asked: by the user.
        own: what the model was trained on, if it is a run's: further on it was never trained.
    Raises:
        UsageError: more was asked for than it has.
    """
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) else 1 << 30
    if asked is not None and asked > positions:
        raise UsageError(
            f"windows of {asked} tokens are too long for a model of {positions} positions",
            f"take --max-length {positions}, or drop it",
        )
    return min(own.max_length if own else LENGTH, positions) if asked is None else asked


def windows(
    text: DataConfig, part: str, tokenizer, *, length: int, count: int, offline: bool, flag: str, whole: bool
) -> list[Tensor]:
    """Full windows of a text's tokens, documents joined as in packed training, in batches.

    Args:
        text: the dataset.
        part: "train" or "validation".
        tokenizer: the model's.
        length: T, tokens in a window.
        count: the most windows.
        offline: never touch the network.
        flag: that named the text, for messages.
        whole: of a single file all is read, whatever the part; for one that was named for this and nothing else.
    Returns:
        (B, T) int64 each, together at most `count` rows.
    Raises:
        UsageError: the text is shorter than one window.
        MissingError: it is not there.
    """
    if whole and Path(text.dataset).is_file():
        text, part = DataConfig(dataset=text.dataset, validation_dataset=text.dataset), "validation"
    reader = RowReader(open_source(text, part, offline=offline), Encoder(tokenizer, "packed", length), length)
    rows = [torch.from_numpy(row).long() for _, row in zip(range(count), reader, strict=False)]
    if not rows:
        raise UsageError(f"{text.dataset} is shorter than one window of {length} tokens", f"give {flag} a longer text")
    return [torch.stack(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
