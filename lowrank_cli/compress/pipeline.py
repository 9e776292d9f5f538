"""A model made smaller: measure, decompose, choose ranks, factor, measure again, write.

Everything is made in memory first; the folder of the result gets the model under its name only when it is whole.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.compress import report, streaming
from lowrank_cli.compress.decomposition import Store, Targets, decompose_all, matrices_of
from lowrank_cli.compress.preparation import Job, stored_dtype
from lowrank_cli.compress.progress import progress
from lowrank_cli.compress.recovery import Recovery
from lowrank_cli.compress.svd_dump import cached_values
from lowrank_cli.errors import LowrankError
from lowrank_cli.evaluate.scoring import not_numbers
from lowrank_cli.measure.perplexity import perplexity
from lowrank_cli.models.lowrank_linear import LowRankLinear, low_rank_linears, replace, replace_linear, weight_of
from lowrank_cli.models.lowrank_quantizer import densify, mark
from lowrank_cli.ops.finite import first_non_finite
from lowrank_cli.run import RunDir
from lowrank_cli.svd.rank_selection import Ranks, Spectra
from lowrank_cli.svd.spectrum import decompose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# seconds that forward passes are timed for, and the fewest of them: the best one counts, for others disturb
TIMED_SECONDS, TIMED_PASSES = 2.0, 3


def run(job: Job | streaming.Streamed, folder: RunDir) -> dict[str, Any]:
    """Compress the model of a job; its folder then holds it with the ranks, the pictures and the numbers.

    Returns:
        What was lost and gained: perplexities, parameters, bytes, tokens a second, before and after.
    Raises:
        LowrankError: a number broke, or the model could not be written.
    """
    if isinstance(job, streaming.Streamed):
        return streaming.run(job, folder)
    config, model, targets = job.config, job.model, job.targets
    result: dict[str, Any] = {
        "method": config.method, "run": str(folder.path), "model": str(folder.model), "weighting": job.weighting,
        **job.texts, **(job.share.record() if job.share else {}),
    }  # fmt: skip
    stored, computed = stored_dtype(config, model.dtype), model.dtype
    # both measurements are of what is stored
    cast_(model, stored)
    before = measure(model, job.measuring, job.other)
    cast_(model, computed)
    bytes_before = sum(p.numel() for p in model.parameters()) * stored.itemsize
    rows: list[dict[str, Any]] = []
    if targets.linears:
        store = Store(folder.path / f".decompositions.{os.getpid()}")
        try:
            plain, weighted = spectra_of(job, store)
            ranks = job.part.ranks(plain, weighted)
            report.check(job.part, plain, ranks)
            rows = report.rows(targets, ranks, plain, weighted)
            result |= report.about(job.part, plain, ranks)
            recovery = None
            if job.chain is not None:
                recovery = Recovery(job.chain, job.calibration, store.shelf, config.common.seed)
            teacher = copy.deepcopy(model) if config.compress.recover == "lrc" else None
            if recovery is not None:
                recovery.remember()
            factor(model, targets, ranks, store, "pifa" if plain.pifa and recovery is None else "factored")
            if recovery is not None:
                result |= recovery.recover(teacher)
                if plain.pifa:
                    pivot(model)
        finally:
            shutil.rmtree(store.shelf.folder, ignore_errors=True)
    cast_(model, stored)
    if config.compress.format == "dense":
        densify(model)
    elif low_rank_linears(model):
        mark(model, {"details": report.details(result)})
    if broken := first_non_finite(model.named_parameters()):
        raise LowrankError(f"{broken} came out with a value that is not finite", "take --dtype float32")
    after = measure(model, job.measuring, job.other)
    for key in before:
        result[f"{key}_before"], result[f"{key}_after"] = before[key], after[key]
    result["bytes_before"] = bytes_before
    result["bytes_after"] = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    streaming.commit(folder.path, lambda path: save(path, model, job.tokenizer), folder.model)
    report.write(folder, rows, result, plots=config.compress.plots)
    report.warn_of_loss(result, job.part)
    return result


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters a dtype. Buffers keep theirs, as on loading: rotary frequencies need 32 bits."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def spectra_of(job: Job, store: Store) -> tuple[Spectra, Spectra]:
    """The singular values that the rule reads as the weights' own, and the weighted ones.

    Weighted decompositions go to the store. Unweighted ones are made of the weights that are factored, later: their
    values come out of the cache if there was an `svd-dump`.
    """
    settings, linears, part = job.part.config, job.targets.linears, job.part
    form = {"shapes": job.targets.shapes, "pifa": settings.pifa, "allow_growth": settings.paper}
    own = {}
    if job.weighting == "none" or (part.reads_own_values and not job.given):
        with progress("singular values", len(linears)) as advance:
            for name, module in linears.items():
                own[name] = cached_values(weight_of(module))
                advance()
    weighted = own
    if job.weighting != "none":
        bounds = Spectra({}, **form)
        decompose_all(
            job.model, linears, store, windows=job.calibration, two_sided=job.weighting == "two-sided",
            damping=settings.damping, largest=bounds.largest_rank, seed=job.config.common.seed,
        )  # fmt: skip
        weighted = {name: store.values_of(name, target) for name, target in linears.items()}
    # a rule that reads only shapes, or only the weighted values, gets those
    return Spectra(job.given or own or weighted, **form), Spectra(weighted, **form)


@torch.no_grad()
def factor(model: nn.Module, targets: Targets, ranks: Ranks, store: Store, form: str) -> None:
    """Put low-rank forms in the place of linears and experts with a rank, in place."""
    with progress("factoring", len(ranks)) as advance:
        for name, rank in ranks.items():
            advance()
            if rank is None:
                continue
            old = targets.linears.pop(name)
            pairs = []
            for key, weight in matrices_of(name, old).items():
                found = store.get(key) if key in store.values else decompose(weight)
                pairs.append(found.factors(weight, rank))
            factors = pairs[0] if weight_of(old).dim() == 2 else map(torch.stack, zip(*pairs, strict=True))
            replace(model, name, rank, form).assign(*factors, getattr(old, "bias", None))


def pivot(model: nn.Module) -> None:
    """Put linears' factors that were trained into the form of fewer parameters."""
    linears = {name: m for name, m in low_rank_linears(model).items() if isinstance(m, LowRankLinear)}
    for name, old in linears.items():
        new = replace_linear(model, name, old.rank, "pifa")
        new.assign(old.A.weight, old.B.weight, old.bias)
        new.was_conv1d = old.was_conv1d


def measure(model: nn.Module, text: list[Tensor], other: list[Tensor]) -> dict[str, float]:
    """Count parameters; on a text measure the perplexity and the speed of the forward pass, on another one perplexity.

    Args:
        model: a causal language model.
        text: windows, (B, T) each; without them only parameters are counted.
        other: windows of a text of another kind.
    """
    found: dict[str, float] = {
        "parameters": sum(p.numel() for p in {*model.parameters()}),
    }
    if not text:
        return found
    console.note("measuring perplexity")
    outcomes = [perplexity(model, ({"input_ids": ids, "labels": ids} for ids in t)) for t in (text, other) if t]
    if not all(math.isfinite(outcome.loss) for outcome in outcomes):
        raise not_numbers()
    outcome = outcomes[0]
    device = next(model.parameters()).device
    times, began = [], time.perf_counter()
    with torch.no_grad():
        for ids in itertools.cycle(text):
            if len(times) >= TIMED_PASSES and time.perf_counter() - began > TIMED_SECONDS:
                break
            start = time.perf_counter()
            model(input_ids=ids.to(device), use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) / ids.numel())
    return (
        found
        | {
            "perplexity": outcome.perplexity,
            "evaluated_tokens": outcome.tokens,
            "tokens_per_second": 1 / min(times),
        }
        | ({"other_perplexity": outcomes[1].perplexity} if other else {})
    )


def save(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write the model and its tokenizer into a folder."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
