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
from lowrank_cli.compress.decomposition import Targets, already_compressed, find_targets
from lowrank_cli.compress.files import read_spectra
from lowrank_cli.compress.svd_dump import Reader, values_of
from lowrank_cli.compress.text import text_of_run, tokenizer_for, window_length, windows
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import UsageError
from lowrank_cli.models import load as models
from lowrank_cli.models.kinds import refuse_kind
from lowrank_cli.models.lowrank_quantizer import QUANT_METHOD
from lowrank_cli.models.source import Source, locate
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.svd.rank_selection import Spectra

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(out, in) of every linear, (E, m, n) of experts."""
        return self.targets.shapes


@dataclass(frozen=True)
class Outline:
    """An Outline says what a compression is going to be, as far as its settings and the model's configuration tell.

    Attributes:
        config: the settings.
        part: the method that chooses the ranks.
        source: where the model is.
        architecture: the model's configuration.
        merging: the model is compressed already, and its factors are multiplied out.
        own: the text that the model was trained on, if it is a run's.
        weighting: "none", "input" or "two-sided".
        calibrating: the text for it.
        length: tokens in a window.
    """

    config: RunConfig
    part: methods.Method
    source: Source
    architecture: PretrainedConfig
    merging: bool
    own: DataConfig | None
    weighting: str
    calibrating: DataConfig | None
    length: int


def outline(config: RunConfig) -> Outline:
    """Find the model and check the settings against its configuration; no weight is read.

    Raises:
        UsageError: not a language model, or settings that do not fit it.
        MissingError: something is not there.
    """
    console.quiet_libraries()
    part = compressing(config)
    source = locate(config.model, offline=config.common.offline)
    architecture = models.config_of(config.model, offline=config.common.offline)
    refuse_kind(architecture, source.name, causal=True)
    quantization = dict(getattr(architecture, "quantization_config", None) or {})
    compressed = quantization.get("quant_method") == QUANT_METHOD
    merging = compressed and config.compress.format == "dense"
    if compressed and not merging:
        raise already_compressed()
    own = text_of_run(source)
    if merging:
        refuse_unused(config, part)
        weighting, calibrating = "none", None
    else:
        weighting, calibrating = weighting_of(part, own)
        settings = part.config
        if weighting == "none" and settings.weighting is None and not settings.paper:
            console.warn(
                f"the text that {source.name} was trained on is not known: errors are not weighted, which loses much "
                f"more; {part.flag('calibrate')} FILE weights them by a text, --dataset FILE measures on one"
            )
    if config.compress.spectra is not None and not part.reads_own_values:
        raise UsageError(
            f"--spectra gives the weights' own singular values, and the rule {part.allocation} does not read them",
            f"drop it, or add {part.flag('allocation')} {part.name}",
        )
    reading = calibrating is not None or config.compress.eval_tokens > 0
    length = window_length(architecture, config.compress.max_length if reading else None, own)
    return Outline(config, part, source, architecture, merging, own, weighting, calibrating, length)


def prepare(config: RunConfig) -> Job | streaming.Streamed:
    """Load the model and the texts; whatever is wrong with them shows here.

    A model in safetensors files that needs no text is not loaded: `streaming` compresses it from file to file.

    Raises:
        UsageError: a model that cannot be compressed, weights that are not finite, a text that is too short, settings
            that do not fit.
        MissingError: something is not there.
    """
    about = outline(config)
    part = about.part
    if about.weighting == "none" and not config.compress.eval_tokens and config.compress.format == "factored":
        reader = Reader(about.source, config, loading=False)
        if reader.files and reader.has_head and config.model.dtype == "auto":
            check_budget(part, reader.shapes)
            given = given_spectra(config, reader.shapes)
            reader.check()
            return streaming.Streamed(config, part, reader, values_of(reader), given)
    device = models.device_of(config.common.device)
    model = models.load(
        config.model,
        config=None,
        dtype=loaded_dtype(config, device),
        device=device,
        seed=config.common.seed,
        offline=config.common.offline,
    ).eval()
    targets = Targets({}, {})
    if not about.merging:
        targets = find_targets(model)
        check_budget(part, targets.shapes)
    given = given_spectra(config, targets.shapes)
    job = Job(config, part, model, targets, weighting=about.weighting, given=given)
    find_texts(job, about)
    return job


def compressing(config: RunConfig) -> methods.Method:
    """The method that chooses the ranks."""
    return next(methods.get(n)(c) for n, c in config.methods.items() if "compress" in methods.get(n).commands)


def weighting_of(part: methods.Method, own: DataConfig | None) -> tuple[str, DataConfig | None]:
    """Return how errors are weighted, and the text to weight them by; None if they are not weighted.

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
            f"{part.flag('weighting')} {weighting} needs text",
            f"add {part.flag('calibrate')} stdlib, or a file of your own",
        )
    return weighting, text


def find_texts(job: Job, about: Outline) -> None:
    """Put a job's tokenizer and its windows of text into it."""
    config, calibrating, offline = job.config, about.calibrating, job.config.common.offline
    needed = calibrating is not None or config.compress.eval_tokens > 0
    job.tokenizer = tokenizer_for(about.source, job.model, offline, needed=needed)
    count = math.ceil(config.compress.eval_tokens / (about.length - 1))
    if calibrating is not None:
        settings = job.part.config
        if count and settings.calibrate is not None and settings.calibrate == config.compress.dataset:
            console.warn(f"{settings.calibrate} both calibrates and measures: the perplexity after will flatter")
        job.calibration = windows(
            calibrating, "train", job.tokenizer, length=about.length, count=settings.samples, offline=offline,
            flag=job.part.flag("calibrate"), whole=settings.calibrate is not None,
        )  # fmt: skip
        check_enough(job, calibrating.dataset)
    measuring = DataConfig(dataset=config.compress.dataset) if config.compress.dataset else about.own or DataConfig()
    if count:
        job.measuring = windows(
            measuring, "validation", job.tokenizer, length=about.length, count=count, offline=offline,
            flag="--dataset", whole=config.compress.dataset is not None,
        )  # fmt: skip
    job.texts = {
        "calibration_text": calibrating.dataset if job.calibration else None,
        "calibration_windows": sum(ids.shape[0] for ids in job.calibration),
        "calibration_tokens": sum(ids.numel() for ids in job.calibration),
        "evaluation_text": measuring.dataset,
    }


def check_budget(part: methods.Method, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UsageError for a budget of parameters that rank 1 everywhere exceeds."""
    least = Spectra({}, shapes, pifa=part.config.pifa).least_share()
    if part.config.rank is None and part.budget < least:
        raise UsageError(
            f"{part.flag('param_budget')} {part.budget:g} is less than every linear at rank 1 takes, {least:.4f}",
            f"take at least {math.ceil(1000 * least) / 1000:g}",
        )


def check_enough(job: Job, name: str) -> None:
    """Say that a calibration text has fewer windows than were asked for.

    With fewer tokens than the widest linear has inputs most directions are never seen: a run's own text, which nobody
    named, is then not used.

    Raises:
        UsageError: text or weighting were asked for, and it has that few.
    """
    settings, found = job.part.config, sum(ids.shape[0] for ids in job.calibration)
    tokens = sum(ids.numel() for ids in job.calibration)
    # which side of experts is the input shows when they run
    widest = max(shape[1] if len(shape) == 2 else min(shape[1:]) for shape in job.shapes.values())
    few = f"{name} is too short to calibrate linears of {widest:,} inputs: {tokens:,} tokens in whole windows"
    if tokens < widest and (settings.calibrate is not None or settings.weighting is not None):
        raise UsageError(
            few,
            f"give {job.part.flag('calibrate')} a longer text, raise {job.part.flag('samples')}, or take "
            f"{job.part.flag('weighting')} none",
        )
    if tokens < widest:
        console.warn(f"{few}; the error is not weighted")
        job.calibration, job.weighting = [], "none"
    elif found < settings.samples:
        console.warn(f"{name} has {found} windows of the {settings.samples} asked for: {tokens:,} tokens")


def loaded_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype to load and decompose in: the given one, else one that holds what the files hold."""
    computed = models.dtype_of(config.model.dtype, device)
    if config.model.dtype != "auto":
        return computed
    return torch.promote_types(computed, stored_dtype(config, computed))


def refuse_unused(config: RunConfig, part: methods.Method) -> None:
    """Raises UsageError for settings of a compression that `--format dense` of a compressed model would not heed."""
    given = [
        part.flag(f.name)
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


def given_spectra(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
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
