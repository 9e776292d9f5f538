"""A compression's parts, found and checked before anything is written: model, linears, texts, settings that fit."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_cli import console, methods
from lowrank_cli.compress import streaming
from lowrank_cli.compress.decomposition import Targets, find_targets
from lowrank_cli.compress.files import read_spectra
from lowrank_cli.compress.svd_dump import Reader
from lowrank_cli.compress.text import check_length, text_of_run, tokenizer_for, windows
from lowrank_cli.config import DataConfig, RunConfig
from lowrank_cli.errors import UsageError
from lowrank_cli.models import load as models
from lowrank_cli.models.lowrank_linear import low_rank_linears
from lowrank_cli.models.source import Source, locate
from lowrank_cli.svd.rank_selection import Spectra

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    tokenizer: Any = None
    calibration: list[Tensor] = field(default_factory=list)
    weighting: str = "none"
    measuring: list[Tensor] = field(default_factory=list)
    texts: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear."""
        return self.targets.shapes


def prepare(config: RunConfig) -> Job | streaming.Streamed:
    """Load the model and the texts; whatever is wrong with them shows here.

    A model in safetensors files that needs no text is not loaded: `streaming` compresses it from file to file.

    Raises:
        UsageError: a model that cannot be compressed, weights that are not finite, a text that is too short, settings
            that would have no effect.
        MissingError: something is not there.
    """
    console.quiet_libraries()
    part = compressing(config)
    source = locate(config.model, offline=config.common.offline)
    own = text_of_run(source.location)
    weighting, calibrating = weighting_of(part, own)
    if config.compress.spectra is not None and not part.reads_own_values:
        raise UsageError(
            f"--spectra gives the weights' own singular values, and the rule {part.allocation} does not read them",
            "drop it, or add --welore-allocation welore",
        )
    if weighting == "none" and not config.compress.eval_tokens and config.compress.format == "factored":
        reader = Reader(source, config, loading=False)
        if reader.files and reader.has_head and config.model.dtype == "auto":
            check_budget(part, reader.shapes)
            given = given_spectra(config, reader.shapes)
            return streaming.Streamed(config, part, reader, streaming.values_of(reader), given)
    device = models.device_of(config.common.device)
    model = models.load(
        config.model,
        config=None,
        dtype=loaded_dtype(config, device),
        device=device,
        seed=config.common.seed,
        offline=config.common.offline,
    ).eval()
    if config.compress.format == "dense" and low_rank_linears(model):
        refuse_unused(config, part)
        targets, weighting, calibrating = Targets({}, {}), "none", None
    else:
        targets = find_targets(model)
        check_budget(part, targets.shapes)
    job = Job(config, part, model, targets, weighting=weighting, given=given_spectra(config, targets.shapes))
    find_texts(job, source, own, calibrating)
    return job


def compressing(config: RunConfig) -> methods.Method:
    """The method that chooses the ranks."""
    return next(methods.get(n)(c) for n, c in config.methods.items() if "compress" in methods.get(n).commands)


def weighting_of(part: methods.Method, own: DataConfig | None) -> tuple[str, DataConfig | None]:
    """How errors are weighted, and the text for it.

    Args:
        part: the method.
        own: the text that the model was trained on, if it is a run's.
    Raises:
        UsageError: weighting was asked for, and there is no text.
    """
    settings = part.config
    text = own if settings.calibrate is None else DataConfig(dataset=settings.calibrate)
    weighting = settings.weighting or ("none" if text is None or settings.paper else "two-sided")
    if weighting == "none":
        return weighting, None
    if text is None:
        raise UsageError(
            f"--welore-weighting {weighting} needs text", "add --welore-calibrate stdlib, or a file of your own"
        )
    return weighting, text


def find_texts(job: Job, source: Source, own: DataConfig | None, calibrating: DataConfig | None) -> None:
    """Put a job's tokenizer and its windows of text into it."""
    config, settings, offline = job.config, job.part.config, job.config.common.offline
    needed = calibrating is not None or config.compress.eval_tokens > 0
    job.tokenizer = tokenizer_for(source, job.model, offline, needed=needed)
    length = config.compress.max_length
    if needed:
        check_length(job.model, length)
    if calibrating is not None:
        if settings.calibrate is not None and settings.calibrate == config.compress.dataset:
            console.warn(f"{settings.calibrate} both calibrates and measures: the perplexity after will flatter")
        job.calibration = windows(
            calibrating, "train", job.tokenizer, length=length, count=settings.samples, offline=offline,
            flag="--welore-calibrate", whole=settings.calibrate is not None,
        )  # fmt: skip
        check_enough(job.calibration, calibrating.dataset, settings.samples, job.shapes)
    measuring = DataConfig(dataset=config.compress.dataset) if config.compress.dataset else own or DataConfig()
    count = math.ceil(config.compress.eval_tokens / (length - 1))
    if count:
        job.measuring = windows(
            measuring, "validation", job.tokenizer, length=length, count=count, offline=offline, flag="--dataset",
            whole=config.compress.dataset is not None,
        )  # fmt: skip
    job.texts = {
        "calibration_text": calibrating and calibrating.dataset,
        "calibration_windows": sum(ids.shape[0] for ids in job.calibration),
        "calibration_tokens": sum(ids.numel() for ids in job.calibration),
        "evaluation_text": measuring.dataset,
    }


def check_budget(part: methods.Method, shapes: dict[str, tuple[int, int]]) -> None:
    """Raises UsageError for a budget of parameters that rank 1 everywhere exceeds."""
    least = Spectra({}, shapes, pifa=part.config.pifa).least_share()
    if part.config.rank is None and part.budget < least:
        raise UsageError(
            f"--welore-param-budget {part.budget:g} is less than every linear at rank 1 takes, {least:.4f}",
            f"take at least {math.ceil(1000 * least) / 1000:g}",
        )


def check_enough(text: list[Tensor], name: str, wanted: int, shapes: dict[str, tuple[int, int]]) -> None:
    """Warn of a calibration text with fewer windows than were asked for.

    Raises:
        UsageError: it has fewer tokens than the widest linear has inputs, so that most directions are never seen.
    """
    found, tokens = sum(ids.shape[0] for ids in text), sum(ids.numel() for ids in text)
    if found >= wanted:
        return
    widest = max(n for _, n in shapes.values())
    if tokens < widest:
        raise UsageError(
            f"{name} is too short to calibrate linears of {widest:,} inputs: {tokens:,} tokens in whole windows",
            "give --welore-calibrate a longer text, or take --welore-weighting none",
        )
    console.warn(f"{name} has {found} windows of the {wanted} asked for: calibrating on {tokens:,} tokens")


def loaded_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype to load and decompose in: the given one, else one that holds what the files hold."""
    computed = models.dtype_of(config.model.dtype, device)
    if config.model.dtype != "auto":
        return computed
    return torch.promote_types(computed, stored_dtype(config, computed))


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


def stored_dtype(config: RunConfig, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that the compressed model is stored in: the given one, else that of the model's own files."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if config.model.dtype in named:
        return named[config.model.dtype]
    own = models.config_of(config.model, offline=config.common.offline).dtype
    return own if isinstance(own, torch.dtype) and own.is_floating_point else otherwise
