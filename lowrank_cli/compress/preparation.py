"""A compression's parts, found and checked before anything is written: model, linears, texts, settings that fit."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_cli import console, methods
from lowrank_cli.compress import streaming
from lowrank_cli.compress.decomposition import Targets, already_compressed, find_targets
from lowrank_cli.compress.files import read_spectra
from lowrank_cli.compress.own_text import own_windows
from lowrank_cli.compress.svd_dump import Reader, values_of
from lowrank_cli.compress.text import (
    OWN,
    Part,
    batched,
    counts_of,
    parts_of,
    text_of_run,
    tokenizer_for,
    window_length,
    windows,
)
from lowrank_cli.config import RunConfig
from lowrank_cli.errors import UsageError
from lowrank_cli.models import load as models
from lowrank_cli.models.kinds import refuse_kind
from lowrank_cli.models.lowrank_quantizer import QUANT_METHOD
from lowrank_cli.models.share import Share, inventory
from lowrank_cli.models.source import Source, locate
from lowrank_cli.models.targets import Matrix
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.svd import layerwise
from lowrank_cli.svd.rank_selection import Spectra

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# tokens of the text of another kind that perplexity is measured on besides
OTHER_TOKENS = 10_000


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
        other: windows of a text of another kind, that it is measured on too.
        texts: what both texts are, for the record.
        given: singular values that were given, by name.
        share: of the layers' parameters that is compressed; None if nothing is.
        chain: the model as blocks, to train back what is lost; None if nothing is trained.
    """

    config: RunConfig
    part: methods.Method
    model: PreTrainedModel
    targets: Targets
    tokenizer: Any = None
    calibration: list[Tensor] = field(default_factory=list)
    weighting: str = "none"
    measuring: list[Tensor] = field(default_factory=list)
    other: list[Tensor] = field(default_factory=list)
    texts: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    share: Share | None = None
    chain: layerwise.Chain | None = None

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
        calibrating: the texts for it; none without weighting.
        length: tokens in a window.
    """

    config: RunConfig
    part: methods.Method
    source: Source
    architecture: PretrainedConfig
    merging: bool
    own: DataConfig | None
    weighting: str
    calibrating: list[Part]
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
        weighting, calibrating = "none", []
    else:
        weighting, calibrating = weighting_of(part, own)
        if weighting == "none" and not part.config.paper:
            console.note(
                f"errors are not weighted by a text, which loses much more; without {part.flag('weighting')} none "
                "the model writes one"
            )
    if config.compress.recover != "none" and weighting == "none":
        raise UsageError(
            f"--recover {config.compress.recover} trains on the text that errors are weighted by, and there is none",
            "take --recover none" if merging else f"drop it, or {part.flag('weighting')} none",
        )
    if config.compress.spectra is not None and not part.reads_own_values:
        raise UsageError(
            f"--spectra gives the weights' own singular values, and the rule {part.allocation} does not read them",
            f"drop it, or add {part.flag('allocation')} {part.name}",
        )
    reading = bool(calibrating) or config.compress.eval_tokens > 0
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
            skeleton = models.meta(about.architecture)
            share = reached(config, skeleton, find_targets(skeleton))
            return streaming.Streamed(config, part, reader, values_of(reader), given, share)
    device = models.device_of(config.common.device)
    model = models.load(
        config.model,
        config=None,
        dtype=loaded_dtype(config, device),
        device=device,
        seed=config.common.seed,
        offline=config.common.offline,
    ).eval()
    targets, share = Targets({}, {}), None
    if not about.merging:
        targets = find_targets(model)
        share = reached(config, model, targets)
        check_budget(part, targets.shapes)
    given = given_spectra(config, targets.shapes)
    job = Job(config, part, model, targets, weighting=about.weighting, given=given, share=share)
    find_texts(job, about)
    if config.compress.recover != "none":
        job.chain = chain_for(job)
    return job


def chain_for(job: Job) -> layerwise.Chain:
    """Return a model as blocks that what is lost can be trained back in.

    Raises:
        UsageError: it is no chain of blocks, or there is too little text to train on and to choose by.
    """
    if len(job.calibration) < 2:
        raise UsageError(
            "--recover trains on the text that errors are weighted by, and there are fewer than two batches of it",
            f"raise {job.part.flag('samples')}, or take --recover none",
        )
    chain = layerwise.chain_of(job.model)
    if chain is None:
        raise UsageError(
            f"--recover goes from block to block, and a {job.model.config.model_type} model is no chain of blocks",
            "take --recover none",
        )
    return chain


def reached(config: RunConfig, model: nn.Module, targets: Targets) -> Share:
    """Say what share of the layers' parameters is compressed.

    Args:
        config: the settings.
        model: dense, on the meta device too.
        targets: found in it.
    Raises:
        UsageError: less than half.
    """
    names = {name if isinstance(target, Matrix) else f"{name}.weight" for name, target in targets.linears.items()}
    share = inventory(model).share(names)
    share.say(config.method, "compresses", check=not config.compress.allow_partial)
    return share


def compressing(config: RunConfig) -> methods.Method:
    """The method that chooses the ranks."""
    return next(methods.get(n)(c) for n, c in config.methods.items() if "compress" in methods.get(n).commands)


def weighting_of(part: methods.Method, own: DataConfig | None) -> tuple[str, list[Part]]:
    """Return how errors are weighted, and the texts to weight them by: those that were given, else the one that the
    model was trained on, else what it writes itself.

    Args:
        part: the method.
        own: the text that the model was trained on, if it is a run's.
    Raises:
        UsageError: texts that cannot be read as such.
    """
    settings = part.config
    weighting = settings.weighting or ("none" if settings.paper else "two-sided")
    if weighting == "none":
        return weighting, []
    if settings.calibrate is not None:
        return weighting, parts_of(settings.calibrate, part.flag("calibrate"))
    return weighting, [Part(OWN) if own is None else Part(own.dataset, data=own, whole=False)]


def find_texts(job: Job, about: Outline) -> None:
    """Put a job's tokenizer and its windows of text into it."""
    config, calibrating, offline = job.config, about.calibrating, job.config.common.offline
    needed = config.compress.eval_tokens > 0 or any(part.data is not None for part in calibrating)
    job.tokenizer = tokenizer_for(about.source, job.model, offline, needed=needed)
    count = math.ceil(config.compress.eval_tokens / (about.length - 1))
    if calibrating:
        given = job.part.config.calibrate is not None
        if count and given and config.compress.dataset in [part.name for part in calibrating]:
            console.warn(f"{config.compress.dataset} both calibrates and measures: the perplexity after will flatter")
        calibrating = calibrate(job, calibrating, about.length, given)
    measuring = DataConfig(dataset=config.compress.dataset) if config.compress.dataset else about.own or DataConfig()
    other = DataConfig()
    if count:
        reading = {"length": about.length, "offline": offline, "flag": "--dataset"}
        job.measuring = batched(
            windows(
                measuring, "validation", job.tokenizer, count=count, whole=config.compress.dataset is not None,
                **reading,
            )
        )  # fmt: skip
        if measuring.dataset != other.dataset:
            few = math.ceil(min(config.compress.eval_tokens, OTHER_TOKENS) / (about.length - 1))
            job.other = batched(windows(other, "validation", job.tokenizer, count=few, whole=False, **reading))
    job.texts = {
        "calibration_text": ", ".join(part.name for part in calibrating) or None,
        "calibration_windows": sum(ids.shape[0] for ids in job.calibration),
        "calibration_tokens": sum(ids.numel() for ids in job.calibration),
        "evaluation_text": measuring.dataset,
        "other_text": other.dataset if job.other else None,
    }


def calibrate(job: Job, parts: list[Part], length: int, given: bool) -> list[Part]:
    """Put the windows that a compression is calibrated on into a job.

    Args:
        job: to put them into.
        parts: the texts.
        length: T, tokens in a window.
        given: a user named the texts; one that is a run's own and too short gives way to what the model writes.
    Returns:
        The texts that were taken.
    Raises:
        UsageError: fewer tokens than the widest linear has inputs, of which most directions would never be seen.
    """
    settings, flag, rows = job.part.config, job.part.flag("calibrate"), []
    for part, count in zip(parts, counts_of(parts, settings.samples), strict=True):
        if part.data is None:
            rows += own_windows(job.model, length=length, count=count, seed=job.config.common.seed, flag=flag)
        else:
            rows += windows(
                part.data, "train", job.tokenizer, length=length, count=count, whole=part.whole, flag=flag,
                offline=job.config.common.offline,
            )  # fmt: skip
    names, tokens = ", ".join(part.name for part in parts), length * len(rows)
    # which side of experts is the input shows when they run
    widest = max(shape[1] if len(shape) == 2 else min(shape[1:]) for shape in job.shapes.values())
    few = f"{names} is too short to calibrate linears of {widest:,} inputs: {tokens:,} tokens in whole windows"
    if tokens < widest and not given and any(part.data is not None for part in parts):
        console.note(f"{few}; the model writes its own text instead")
        return calibrate(job, [Part(OWN)], length, given)
    if tokens < widest:
        raise UsageError(
            few,
            f"give {flag} a longer text, raise {job.part.flag('samples')}, or take {job.part.flag('weighting')} none",
        )
    if len(rows) < settings.samples:
        console.warn(f"{names} has {len(rows)} windows of the {settings.samples} asked for: {tokens:,} tokens")
    job.calibration = batched(rows)
    return parts


def check_budget(part: methods.Method, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UsageError for a budget of parameters that rank 1 everywhere exceeds."""
    least = Spectra({}, shapes, pifa=part.config.pifa).least_share()
    if part.config.rank is None and part.budget < least:
        raise UsageError(
            f"{part.flag('param_budget')} {part.budget:g} is less than every linear at rank 1 takes, {least:.4f}",
            f"take at least {math.ceil(1000 * least) / 1000:g}",
        )


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
