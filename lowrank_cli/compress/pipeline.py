"""A model made smaller: measure, decompose, choose ranks, factor, measure again, write.

Everything is made in memory first; the folder of the result gets the model under its name only when it is whole.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_cli import console, methods
from lowrank_cli.compress import report, streaming
from lowrank_cli.compress.decomposition import Store, Targets, decompose_all, find_targets
from lowrank_cli.compress.files import read_spectra
from lowrank_cli.compress.progress import progress
from lowrank_cli.compress.svd_dump import Reader, cached_values
from lowrank_cli.compress.text import text_of_run, tokenizer_for, windows
from lowrank_cli.config import DataConfig, RunConfig
from lowrank_cli.errors import UsageError
from lowrank_cli.evaluate.perplexity import perplexity
from lowrank_cli.models import load as models
from lowrank_cli.models.lowrank_linear import low_rank_linears, replace_linear, weight_of
from lowrank_cli.models.lowrank_quantizer import densify, mark
from lowrank_cli.models.source import locate
from lowrank_cli.run import RunDir
from lowrank_cli.svd.rank_selection import Ranks, Spectra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# forward passes that are timed
TIMED = 3


@dataclass
class Job:
    """A compression's parts, checked, before anything is written.

    Attributes:
        config: the settings.
        part: the method that chooses the ranks.
        model: the model, on its device.
        targets: its linears; none if the model is compressed already and only its format changes.
        tokenizer: the model's, or None.
        calibration: windows of text, (B, T) each; empty without weighting.
        weighting: "none", "input" or "two-sided".
        measuring: windows of text that perplexity is measured on.
        texts: what both texts are, for the record.
        given: singular values that were given, by name.
    """

    config: RunConfig
    part: methods.Method
    model: PreTrainedModel
    targets: Targets
    tokenizer: Any
    calibration: list[Tensor]
    weighting: str
    measuring: list[Tensor]
    texts: dict[str, Any]
    given: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear."""
        return self.targets.shapes


def prepare(config: RunConfig, *, reading: bool = True) -> Job | streaming.Streamed:
    """Load the model and the texts; whatever is wrong with them shows here.

    A model in safetensors files that needs no text is not loaded: `streaming` compresses it from file to file.

    Args:
        config: of the command compress.
        reading: whether such files are read and decomposed now; their linears are known without.
    Raises:
        UsageError: a model that cannot be compressed, weights that are not finite, a text that is too short.
        MissingError: something is not there.
    """
    console.quiet_libraries()
    part = next(methods.get(n)(c) for n, c in config.methods.items() if "compress" in methods.get(n).commands)
    settings, offline = part.config, config.common.offline
    device = models.device_of(config.common.device)
    source = locate(config.model, offline=offline)
    own = text_of_run(source.location)
    without_text = settings.weighting == "none" or (settings.calibrate is None and (own is None or settings.paper))
    if without_text and not config.compress.eval_tokens and config.compress.format == "factored":
        reader = Reader(source, config)
        if reader.files and reader.has_head and config.model.dtype == "auto":
            given = given_spectra(config, reader.shapes)
            values = streaming.values_of(reader) if reading else {}
            return streaming.Streamed(config, part, reader, values, given)
    model = models.load(
        config.model,
        config=None,
        dtype=models.dtype_of(config.model.dtype, device),
        device=device,
        seed=config.common.seed,
        offline=offline,
    ).eval()
    merging = config.compress.format == "dense" and bool(low_rank_linears(model))
    if merging:
        refuse_unused(config, part)
    targets = Targets({}, {}) if merging else find_targets(model)
    calibrating = None if settings.calibrate is None else DataConfig(dataset=settings.calibrate)
    calibrating = calibrating or own
    weighting = settings.weighting or ("none" if calibrating is None or settings.paper else "two-sided")
    if weighting != "none" and calibrating is None:
        raise UsageError(
            f"--welore-weighting {weighting} needs text", "add --welore-calibrate stdlib, or a file of your own"
        )
    if merging:
        weighting = "none"
    measuring = DataConfig(dataset=config.compress.dataset) if config.compress.dataset else own or DataConfig()
    tokenizer = tokenizer_for(source, model, offline, needed=weighting != "none" or config.compress.eval_tokens > 0)
    if weighting != "none" and settings.calibrate is not None and settings.calibrate == config.compress.dataset:
        console.warn(f"{settings.calibrate} both calibrates and measures: the perplexity after will flatter")
    length = config.compress.max_length
    count = math.ceil(config.compress.eval_tokens / (length - 1))
    common = {"length": length, "offline": offline}
    return Job(
        config=config,
        part=part,
        model=model,
        targets=targets,
        tokenizer=tokenizer,
        calibration=windows(
            calibrating,
            "train",
            tokenizer,
            count=settings.samples,
            flag="--welore-calibrate",
            whole=settings.calibrate is not None,
            **common,
        )
        if weighting != "none"
        else [],
        weighting=weighting,
        measuring=windows(
            measuring,
            "validation",
            tokenizer,
            count=count,
            flag="--dataset",
            whole=config.compress.dataset is not None,
            **common,
        )
        if count
        else [],
        texts={"calibration": calibrating.dataset if weighting != "none" else None, "evaluation": measuring.dataset},
        given=given_spectra(config, targets.shapes),
    )


def refuse_unused(config: RunConfig, part: methods.Method) -> None:
    """Raises UsageError for settings of a compression that `--format dense` of a compressed model would not heed."""
    given = [
        f"--welore-{f.name.replace('_', '-')}"
        for f in dataclasses.fields(part.config)
        if getattr(part.config, f.name) != getattr(type(part.config)(), f.name)
    ]
    given += ["--spectra"] if config.compress.spectra is not None else []
    if given:
        raise UsageError(
            f"the model is compressed already: --format dense only multiplies its factors out, "
            f"and {' and '.join(given)} would have no effect",
            "drop it, or give the model that it was made from"
            if len(given) == 1
            else "drop them, or give the model that it was made from",
        )


def given_spectra(config: RunConfig, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Singular values of --spectra, for these linears; none without it."""
    if config.compress.spectra is None or not shapes:
        return {}
    return read_spectra(Path(config.compress.spectra), shapes)


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
        "calibration_text": job.texts["calibration"], "evaluation_text": job.texts["evaluation"],
    }  # fmt: skip
    stored, computed = stored_dtype(model, job.config), model.dtype
    # both measurements are of what is stored
    before = measure(model.to(stored), job.measuring)
    model.to(computed)
    bytes_before = sum(p.numel() for p in model.parameters()) * stored.itemsize
    rows: list[dict[str, Any]] = []
    if targets.linears:
        store = Store(folder.path / f".decompositions.{os.getpid()}")
        try:
            plain, weighted = spectra_of(job, store)
            ranks = job.part.ranks(plain, weighted)
            rows = report.rows(targets, ranks, plain, weighted)
            result |= report.about(job.part, plain, ranks)
            factor(model, targets, ranks, store, "pifa" if plain.pifa else "factored")
        finally:
            shutil.rmtree(store.shelf.folder, ignore_errors=True)
    after = measure(model.to(stored), job.measuring)
    if config.compress.format == "dense":
        densify(model)
    elif low_rank_linears(model):
        mark(model, {"details": report.details(result)})
    for key in before:
        result[f"{key}_before"], result[f"{key}_after"] = before[key], after[key]
    result["bytes_before"] = bytes_before
    result["bytes_after"] = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    streaming.commit(folder.path, lambda path: save(path, model, job.tokenizer), folder.model)
    report.write(folder, rows, result, plots=config.compress.plots)
    return result


def stored_dtype(model: nn.Module, config: RunConfig) -> torch.dtype:
    """The dtype that the compressed model is stored in: the given one, else that of the model's own files."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if config.model.dtype in named:
        return named[config.model.dtype]
    own = models.config_of(config.model, offline=config.common.offline).dtype
    return own if isinstance(own, torch.dtype) and own.is_floating_point else model.dtype


def spectra_of(job: Job, store: Store) -> tuple[Spectra, Spectra]:
    """The weights' own singular values and the weighted ones; the decompositions go to the store."""
    settings, linears = job.part.config, job.targets.linears
    decompose_all(
        job.model, linears, store, windows=job.calibration, weighting=job.weighting, damping=settings.damping,
        seed=job.config.common.seed,
    )  # fmt: skip
    form = {"shapes": job.targets.shapes, "pifa": settings.pifa, "allow_growth": settings.paper}
    weighted = Spectra({name: store.get(name).values.cpu() for name in linears}, **form)
    if job.given:
        return Spectra(job.given, **form), weighted
    if job.weighting == "none":
        return weighted, weighted
    with progress("singular values", len(linears)) as advance:
        values = {}
        for name, module in linears.items():
            values[name] = cached_values(name, weight_of(module))
            advance()
    return Spectra(values, **form), weighted


@torch.no_grad()
def factor(model: nn.Module, targets: Targets, ranks: Ranks, store: Store, form: str) -> None:
    """Put low-rank linears in the place of those with a rank, in place."""
    with progress("factoring", len(ranks)) as advance:
        for name, rank in ranks.items():
            advance()
            if rank is None:
                continue
            old = targets.linears.pop(name)
            first, second = store.get(name).factors(weight_of(old), rank)
            replace_linear(model, name, rank, form).assign(first, second, old.bias)


def measure(model: nn.Module, text: list[Tensor]) -> dict[str, float]:
    """Parameters, and on a text the perplexity and the speed of the forward pass."""
    found: dict[str, float] = {
        "parameters": sum(p.numel() for p in {*model.parameters()}),
    }
    if not text:
        return found
    console.note("measuring perplexity")
    outcome = perplexity(model, ({"input_ids": ids, "labels": ids} for ids in text))
    device = next(model.parameters()).device
    times = []
    with torch.no_grad():
        for ids in (text * TIMED)[:TIMED]:
            start = time.perf_counter()
            model(input_ids=ids.to(device), use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) / ids.numel())
    return found | {
        "perplexity": outcome.perplexity,
        "evaluated_tokens": outcome.tokens,
        "tokens_per_second": 1 / min(times),
    }


def save(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write the model and its tokenizer into a folder."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
