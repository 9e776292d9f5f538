"""The text that a compression is calibrated on and measured with, as windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_cli.config import build
from lowrank_cli.data import tasks
from lowrank_cli.data.documents import open_source
from lowrank_cli.data.rows import Encoder, RowReader
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.foreign import read_yaml
from lowrank_cli.models import load as models
from lowrank_cli.models.architecture import check_length, positions
from lowrank_cli.models.source import Source
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# tokens in a window
LENGTH = 512
# sequences in a forward pass
BATCH = 4


# the text that the model writes itself
OWN = "self"


@dataclass(frozen=True)
class Part:
    """A Part is one of the texts that a compression is calibrated on.

    Attributes:
        name: as it was given: a file, a data set, or "self".
        share: of the windows.
        data: where it is; None for what the model writes itself.
        whole: of a single file all is read, not the part that training would.
    """

    name: str
    share: float = 1.0
    data: DataConfig | None = None
    whole: bool = True


def parts_of(text: str, flag: str) -> list[Part]:
    """Return the texts of a setting: one, or several with commas between, each with its share after a colon if it has
    one: `c4.jsonl:0.7,self:0.3`.

    Raises:
        UsageError: a share that is no number above 0, or an empty name.
    """
    found = []
    for one in [text] if Path(text).exists() else text.split(",") if text else [text]:
        name, share = one.strip(), 1.0
        if not Path(name).exists() and ":" in name:
            name, _, given = name.rpartition(":")
            try:
                share = float(given)
            except ValueError:
                share = math.nan
            if not 0 < share < math.inf:
                raise UsageError(f"{flag} {text}: '{given}' is no share of a text", f"such as {flag} {name}:0.5")
        if not name:
            raise UsageError(f"{flag} '{text}' names no text", f"give a file, a data set, stdlib or {OWN}")
        found.append(Part(name, share, None if name == OWN else DataConfig(dataset=name)))
    return found


def counts_of(parts: Sequence[Part], total: int) -> list[int]:
    """Return how many windows of each part make a total: at least one each, by their shares."""
    shares = sum(part.share for part in parts)
    ends = [round(total * sum(part.share for part in parts[: i + 1]) / shares) for i in range(len(parts))]
    return [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Records(DataConfig):
    """Records that a run was fine-tuned on, with what says how they become text."""

    task: TaskConfig | None = None


def text_of_run(source: Source) -> DataConfig | None:
    """The text that a run was trained on and the length of its windows, if the weights are in a run folder."""
    place = Path(source.adapter or source.location)
    for folder in (place.parent, place.parent.parent):
        if (folder / "run.json").is_file() and (folder / "config.yaml").is_file():
            return _trained_on(folder / "config.yaml")
    return None


def _trained_on(file: Path) -> DataConfig | None:
    """The text of a run's configuration; None for a command that trains on none, and for labelled examples."""
    from lowrank_cli.train.prepare import RUNNING_TEXT

    settings = read_yaml(file)
    values = {key: (value, f"{key} in {file}") for key, value in settings.items() if value is not None}
    keys = ("dataset", "dataset_config", "validation_dataset", "text_field", "max_length")
    text = build(DataConfig, {key: values[key] for key in keys if key in values})
    if settings.get("command") == "pretrain":
        return text
    if settings.get("command") != "finetune":
        return None
    task = build(TaskConfig, values)
    if task.task == RUNNING_TEXT:
        return text
    if task.task and tasks.describe(task.task).kind != "causal":
        return None
    return Records(**{**vars(text), "dataset": task.task or text.dataset}, task=task)


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
    if asked is not None:
        check_length(config, asked, "windows")
        return asked
    return min(own.max_length if own else LENGTH, positions(config) or 1 << 30)


def windows(
    text: DataConfig, part: str, tokenizer, *, length: int, count: int, offline: bool, flag: str, whole: bool
) -> list[Tensor]:
    """Return full windows of a text's tokens, documents or records joined as in packed training.

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
        (T,) int64 each, at most `count`.
    Raises:
        UsageError: the text is shorter than one window.
        MissingError: it is not there.
    """
    if whole and Path(text.dataset).is_file():
        text, part = DataConfig(dataset=text.dataset, validation_dataset=text.dataset), "validation"
    if isinstance(text, Records):
        rows = _of_records(text, part, tokenizer, length, count, offline)
    else:
        reader = RowReader(open_source(text, part, offline=offline), Encoder(tokenizer, "packed", length), length)
        rows = [torch.from_numpy(row).long() for _, row in zip(range(count), reader, strict=False)]
    if not rows:
        raise UsageError(f"{text.dataset} is shorter than one window of {length} tokens", f"give {flag} a longer text")
    return rows


def batched(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return windows, (T,) each, in batches of (B, T)."""
    return [torch.stack(tuple(rows[i : i + BATCH])) for i in range(0, len(rows), BATCH)]


def _of_records(text: Records, part: str, tokenizer, length: int, count: int, offline: bool) -> list[Tensor]:
    """Windows of records as fine-tuning saw them: rendered by their template, one after the other."""
    from lowrank_cli.data import supervised

    data = supervised.build(
        text, text.task, batch_size=1, total_batch_size=1, eval_tokens=count * length, seed=0, offline=offline,
        tokenizer=tokenizer,
    )  # fmt: skip
    batches = data.validation()
    if part == "train":
        batches = (data.train.next_update()[0] for _ in range(data.train.updates_per_epoch))
    return list(islice(_cut(batches, length), count))


def _cut(batches: Iterator[dict[str, Tensor]], length: int) -> Iterator[Tensor]:
    """The tokens of batches of one row, joined and cut into windows, without what pads them."""
    left = torch.empty(0, dtype=torch.long)
    for batch in batches:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        left = torch.cat([left, ids[0] if mask is None else ids[mask.bool()]])
        while len(left) >= length:
            yield left[:length]
            left = left[length:]
