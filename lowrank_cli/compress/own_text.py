"""Text that a model writes itself: what it is calibrated on where no other text is given.

It is sampled from the model, from the token that begins a text: half of it at temperature 1, so of the very kind that
the model has learned (LLM-QAT, arXiv:2305.17888, sec. 3.1, generates the data for quantization so), half at 2, where
the model is less sure of itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lowrank_cli import foreign
from lowrank_cli.compress.progress import progress
from lowrank_cli.data.cache import cached_folder
from lowrank_cli.errors import UsageError
from lowrank_cli.svd.calibration import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# sequences that are written together: enough to fill the products, and a cache that fits beside the model
BATCH = 32
# half of the text is what the model would say: of that alone it is so sure that gradients say little of most weights
TEMPERATURES = (1.0, 2.0)
FILE = "windows.safetensors"
# what the cached windows depend on besides the weights; a new number makes them anew
VERSION = 3


def own_windows(model: PreTrainedModel, *, length: int, count: int, seed: int, flag: str) -> list[Tensor]:
    """Return windows that the model writes, out of the cache if these weights have written them before.

    Args:
        model: a causal language model.
        length: T, tokens in a window.
        count: of windows.
        seed: of the draws.
        flag: that takes another text, for messages.
    Returns:
        (T,) int64 each, on the CPU.
    Raises:
        UsageError: a model that does not write.
    """
    if not model.can_generate():
        raise UsageError(
            f"a {type(model).__name__} does not write text that it could be calibrated on", f"give {flag} a file"
        )
    key = hashlib.sha256(f"{VERSION} {length} {count} {seed} {model.device.type}".encode())
    for name, p in model.named_parameters():
        key.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        key.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())

    def make(folder: Path) -> None:
        (folder / FILE).write_bytes(save({"windows": cut(write(model, length, count, seed))}))

    folder = cached_folder("own-text", key.hexdigest()[:32], make)
    return list(foreign.read_tensors(folder / FILE)["windows"].long())


def write(model: PreTrainedModel, length: int, count: int, seed: int) -> Tensor:
    """Sample (count, length) tokens, int32; a text that ends within a window is followed by the next one."""
    halves = (count - count // 2, count // 2)
    batches = [
        (min(BATCH, part - done), temperature)
        for part, temperature in zip(halves, TEMPERATURES, strict=True)
        for done in range(0, part, BATCH)
    ]
    first = _first_token(model)
    devices = [model.device] if model.device.type == "cuda" else []
    written = []
    with (
        progress("the model writes the text that it is calibrated on", len(batches) * (length - 1)) as advance,
        plainly(model),
        frozen(model),
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(),
    ):
        torch.manual_seed(seed)
        for rows, temperature in batches:
            start = (
                torch.full((rows, 1), first)
                if first is not None
                else torch.randint(model.config.get_text_config().vocab_size, (rows, 1))
            ).to(model.device)
            ids = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                stopping_criteria=StoppingCriteriaList([_Told(advance)]),
                do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=length - 1, use_cache=True,
                pad_token_id=0,
            )  # fmt: skip
            written.append(ids.cpu().int())
    return torch.cat(written)


def cut(texts: Tensor) -> Tensor:
    """Cut texts, (N, T), that follow each other into as many windows that begin anywhere in a text.

    So do those of packed training, and those that a model is measured on. Windows that all began with the first token
    of a text would leave the model at a loss where another one comes first, which attention makes a special one.
    """
    count, length = texts.shape
    starts = torch.arange(count) * (length + max(1, length // count))
    return texts.flatten()[(starts[:, None] + torch.arange(length)) % texts.numel()]


def _first_token(model: nn.Module) -> int | None:
    """Return the token that begins a text, or ends the one before; None if the model has neither."""
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return token
    return None


@contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """Sample from the model's own distribution: without the penalties, bans and ends of its generation_config."""
    given = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = given


class _Told(StoppingCriteria):
    """Tells of every token and stops at none."""

    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
