"""Perplexity of a text in the protocols of the literature: `lowrank eval ppl`.

- Windows that do not overlap, whole ones only, the first token of each not scored: how WikiText-2 and C4 are measured
  since GPTQ (arXiv:2210.17323), WeLore's tables among them.
- Windows that overlap (`stride`): every token but the first is scored once, with what fits before it.
- Documents by themselves, cut to a window: how GaLore (arXiv:2403.03507) measures C4.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_cli import console
from lowrank_cli.data.cache import cache_dir, fingerprint
from lowrank_cli.data.documents import open_source
from lowrank_cli.errors import LowrankError, MissingError, PreflightError, UsageError
from lowrank_cli.evaluate.progress import Progress
from lowrank_cli.evaluate.published import wikitext_rows
from lowrank_cli.evaluate.scoring import MAX_ROWS, not_numbers, rows_that_fit
from lowrank_cli.evaluate.subject import Subject
from lowrank_cli.evaluate.suites import find
from lowrank_cli.foreign import entry, read_json
from lowrank_cli.measure.perplexity import Perplexity, perplexity
from lowrank_cli.models.forward import takes_chunked_path
from lowrank_cli.run import write_json
from lowrank_cli.settings.evaluate import HarnessConfig
from lowrank_cli.settings.training import DataConfig

WIKITEXT2 = "wikitext2"
C4 = "c4"
# of C4: enough text for as many windows of 2048 tokens as the literature takes
C4_TOKENS = 256 * 2048
# what is measured is kept this often, for a call that is interrupted
KEEP_EVERY_S = 10.0
_SUMS = {"done": int, "nats": (int, float), "tokens": int}
_BLANK = "\n\n"


@dataclass(frozen=True)
class Text:
    """A Text is what perplexity is measured on.

    Attributes:
        name: for people.
        documents: one text, or many that are measured each by itself.
        num_words: between blanks, of all of it.
    """

    name: str
    documents: list[str]
    num_words: int


def read_text(settings: HarnessConfig, *, offline: bool) -> Text:
    """The text that the settings name.

    Raises:
        MissingError: it is not there, or not without a network.
        UsageError: it cannot be read as given.
    """
    name, data_dir = settings.dataset, Path(settings.data_dir).expanduser() if settings.data_dir else None
    joined = settings.documents == "joined"
    if name == WIKITEXT2 or re.fullmatch(r"wiki\.(train|valid|test)\.(raw|tokens)(\.gz)?", Path(name).name):
        rows = _wikitext_rows(name, data_dir, offline)
        text = _BLANK.join(rows)
        what = "wikitext-2 test" if name == WIKITEXT2 else Path(name).name
        return Text(f"{what}, rows joined by two line ends", [text], len(text.split()))
    if name == C4:
        found = find(data_dir, ("c4-validation.00000-of-00008.json", "c4*.json")) if data_dir else None
        if data_dir and not found:
            raise MissingError(f"{data_dir} has no file of C4", "put c4-validation.00000-of-00008.json.gz there")
        name = str(found) if found else "allenai/c4"
    source = open_source(
        DataConfig(dataset=name, validation_dataset=name, text_field=settings.text_field),
        "validation",
        offline=offline,
    )
    documents = []
    # four characters are a token or less in every tokenizer of use
    room = 8 * (settings.max_tokens or (C4_TOKENS if settings.dataset == C4 else 10**9))
    for document in source:
        documents.append(document)
        room -= len(document)
        if room <= 0:
            break
    if joined:
        # C4's documents are joined by a blank, as in GPTQ's code; of a .txt file the pieces are the text
        plain = name.endswith((".txt", ".txt.gz"))
        documents = [("" if plain else " " if settings.dataset == C4 else _BLANK).join(documents)]
    return Text(source.name, documents, sum(len(document.split()) for document in documents))


def _wikitext_rows(name: str, data_dir: Path | None, offline: bool) -> list[str]:
    path = Path(name) if name != WIKITEXT2 else find(data_dir, ("wiki.test.raw",)) if data_dir else None
    if path is not None:
        return wikitext_rows(path)
    if data_dir is not None:
        raise MissingError(f"{data_dir} has no wiki.test.raw", "put WikiText-2's raw files there")
    from datasets import load_dataset

    try:
        return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except (OSError, ValueError, RuntimeError):
        hub = "the hub is not asked offline" if offline else "the hub did not answer"
        raise MissingError(
            f"WikiText-2 is not in the cache, and {hub}",
            "give a folder with wiki.test.raw: --data-dir FOLDER; or any text: --dataset FILE",
        ) from None


def windows(tokens: Sequence[int], window: int, stride: int | None) -> Iterator[tuple[list[int], int]]:
    """The windows of a text.

    Args:
        tokens: of the text.
        window: tokens that the model sees at once.
        stride: tokens that a window scores; None: windows side by side, the first token of each not scored, a rest
            shorter than a window left out unless it is all there is.
    Yields:
        The tokens of a window, and how many at its end are scored.
    """
    if stride is None:
        whole = max(1, len(tokens) // window)
        for start in range(0, whole * window, window):
            part = list(tokens[start : start + window])
            yield part, len(part) - 1
        return
    # the first window scores all it can; from then on `stride` tokens each
    end = min(window, len(tokens))
    yield list(tokens[:end]), end - 1
    while end < len(tokens):
        new = min(stride, len(tokens) - end)
        end += new
        yield list(tokens[max(0, end - window) : end]), new


def batches(parts: Sequence[tuple[list[int], int]], num_rows: int) -> Iterator[dict[str, Tensor]]:
    """Windows as batches: `input_ids` and `labels` (B, T), -100 where nothing is scored; shorter ones padded."""
    for start in range(0, len(parts), num_rows):
        chunk = parts[start : start + num_rows]
        length = max(len(tokens) for tokens, _ in chunk)
        ids = torch.zeros(len(chunk), length, dtype=torch.long)
        labels = torch.full((len(chunk), length), -100)
        for i, (tokens, scored) in enumerate(chunk):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            if scored:
                labels[i, len(tokens) - scored : len(tokens)] = ids[i, len(tokens) - scored : len(tokens)]
        yield {"input_ids": ids, "labels": labels}


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, settings: HarnessConfig) -> list[list[int]]:
    """The tokens of each document, with the special ones that the tokenizer adds by itself."""
    cut = settings.max_tokens or (C4_TOKENS if settings.dataset == C4 and settings.documents == "joined" else None)
    found, left = [], cut or 10**12
    encoded = tokenizer(text.documents, return_attention_mask=False, verbose=False)["input_ids"]
    for ids in encoded:
        kept = ids[: min(left, settings.window if settings.documents == "separate" else left)]
        if len(kept) > 1:
            found.append(kept)
        left -= len(kept)
        if left <= 1:
            break
    return found


def evaluate(subject: Subject, text: Text, settings: HarnessConfig, batch_size: int | None) -> dict[str, Any]:
    """The perplexity of a model on a text.

    Args:
        subject: the model.
        text: of `read_text`.
        settings: window, stride, documents and max_tokens are used.
        batch_size: windows in a pass; None for what fits.
    Returns:
        Per token and per word, with the counts. Per word is exp of the nats of all tokens over the words of the text;
        tokens that the protocol does not score count as the mean of the others.
    Raises:
        UsageError: the text is shorter than two tokens, or a window or stride that cannot be.
        PreflightError: a window does not fit in memory.
    """
    start = time.perf_counter()
    model = subject.model
    window = _window(subject, settings)
    documents = tokenize(text, subject.tokenizer, settings)
    if not documents:
        raise UsageError(f"{text.name} has fewer than two tokens", "give more text with --dataset")
    parts = [part for ids in documents for part in windows(ids, window, settings.stride)]
    if settings.documents == "separate":
        parts.sort(key=lambda part: -len(part[0]))
    num_tokens = sum(map(len, documents))
    # without the logits of a whole window, where the architecture allows that
    kept = 512 if takes_chunked_path(model) else window
    limit = MAX_ROWS["cpu"] if model.device.type == "cpu" else 32
    rows = batch_size or min(limit, rows_that_fit(model, window, kept, 0))
    console.note(f"ppl: {text.name}: {num_tokens:,} tokens in {len(parts):,} windows of {window}")
    with Progress("ppl") as progress:
        num_batches = math.ceil(len(parts) / rows)
        progress.begin("batches scored", num_batches)
        try:
            measured = _measure(subject, parts, rows, progress, fresh=settings.fresh)
        except (torch.OutOfMemoryError, MemoryError):
            raise PreflightError(
                f"{rows} windows of {window} tokens do not fit in the memory of {model.device}",
                f"lower --batch-size (it was {rows}), or --window",
            ) from None
    num_words = _words(text, documents, subject.tokenizer, settings)
    nats = measured.loss * num_tokens
    seconds = time.perf_counter() - start
    return {
        "perplexity": measured.perplexity, "loss": measured.loss, "num_scored": measured.tokens,
        "num_tokens": num_tokens, "num_words": num_words,
        "word_perplexity": math.exp(min(nats / num_words, 700.0)) if num_words else None,
        "num_windows": len(parts), "window": window, "stride": settings.stride, "documents": settings.documents,
        "text": text.name, "tokens_per_second": round(num_tokens / seconds, 1), "seconds": round(seconds, 3),
    }  # fmt: skip


def _measure(
    subject: Subject, parts: list[tuple[list[int], int]], rows: int, progress: Progress, *, fresh: bool
) -> Perplexity:
    """The perplexity over all windows; what an interrupted call has measured of the same ones is taken over."""
    identity = [subject.digest, str(subject.model.dtype), subject.model.config.to_json_string(), rows]
    name = fingerprint([identity, hashlib.sha256(json.dumps(parts).encode()).hexdigest()])
    kept = cache_dir() / "eval-ppl" / f"{name}.json"
    sums = {"done": 0, "nats": 0.0, "tokens": 0}
    if kept.is_file() and not fresh:
        try:
            found = read_json(kept)
            sums = {key: entry(found, key, kind, kept) for key, kind in _SUMS.items()}
            console.note("ppl: windows of an interrupted evaluation are taken over; --fresh forgets them")
        except LowrankError as error:
            console.note(f"ppl: {error.message}; it is measured from the start")
    for _ in range(sums["done"]):
        progress.advance()
    saved = time.monotonic()
    for i, batch in enumerate(batches(parts, rows)):
        if i < sums["done"]:
            continue
        found = perplexity(subject.model, [batch], between=progress.advance)
        if not math.isfinite(found.loss):
            raise not_numbers()
        sums = {
            "done": i + 1,
            "nats": sums["nats"] + found.loss * found.tokens,
            "tokens": sums["tokens"] + found.tokens,
        }
        if time.monotonic() - saved > KEEP_EVERY_S:
            # without room for it, an interrupted call begins anew
            with suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, sums)
            saved = time.monotonic()
    kept.unlink(missing_ok=True)
    return Perplexity(sums["nats"] / max(1, sums["tokens"]), sums["tokens"])


def _words(text: Text, documents: list[list[int]], tokenizer: PreTrainedTokenizerBase, settings: HarnessConfig) -> int:
    """Words of what was tokenized: all of the text, or of its beginning, which is put into words again."""
    if settings.max_tokens is None and settings.documents == "joined" and settings.dataset != C4:
        return text.num_words
    return sum(len(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in documents)


def _window(subject: Subject, settings: HarnessConfig) -> int:
    longest = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None) or settings.window
    window = settings.window
    if window > longest:
        console.warn(f"--window {window} is more than the model's context; {longest} is taken")
        window = longest
    if settings.stride is not None and settings.stride >= window:
        raise UsageError(
            f"--stride {settings.stride} leaves no context in a window of {window}",
            f"give at most {window - 1}; without --stride windows do not overlap",
        )
    return window


def name_of(settings: HarnessConfig, window: int) -> str:
    """ppl-wikitext2-w2048: what has the same name is the same measurement, of another time."""
    parts = ["ppl", Path(settings.dataset).name.replace(".", "-"), f"w{window}"]
    parts += [f"s{settings.stride}"] if settings.stride else []
    parts += [settings.documents] if settings.documents != "joined" else []
    parts += [f"t{settings.max_tokens}"] if settings.max_tokens else []
    return "-".join(parts)
