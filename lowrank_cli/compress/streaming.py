"""Compress a model one weight at a time, from its safetensors files into new ones: no more than a layer in memory.

For models that are larger than memory: without text, so that nothing is weighted and nothing is measured. The result
is the same as in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from lowrank_cli.compress import report
from lowrank_cli.compress.decomposition import Targets
from lowrank_cli.compress.pictures import place_of
from lowrank_cli.compress.progress import progress
from lowrank_cli.compress.svd_dump import Reader, give_back
from lowrank_cli.config import RunConfig
from lowrank_cli.foreign import INDEX
from lowrank_cli.methods import Method
from lowrank_cli.models import load as models
from lowrank_cli.models.lowrank_linear import FORMS
from lowrank_cli.models.lowrank_quantizer import LowRankConfig
from lowrank_cli.models.share import Share
from lowrank_cli.run import RunDir
from lowrank_cli.strict_json import dumps
from lowrank_cli.svd.rank_selection import Ranks, Spectra
from lowrank_cli.svd.spectrum import decompose

# a file is written when it has so many bytes: they, and the copy that is written, are held beside a linear's factors
FILE_BYTES = 64 << 20
# what a folder has besides weights and their index, and the copy needs as well
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".index.json", ".pt", ".pth", ".h5", ".msgpack")


@dataclass
class Streamed:
    """A compression that never loads the model, checked, before anything is written.

    Attributes:
        config: the settings.
        part: the method that chooses the ranks.
        reader: the model's files.
        values: singular values of its linears.
        given: those to choose ranks by instead, if --spectra gave some.
        share: of the layers' parameters that is compressed.
    """

    config: RunConfig
    part: Method
    reader: Reader
    values: dict[str, Tensor]
    given: dict[str, Tensor]
    share: Share


def run(job: Streamed, folder: RunDir) -> dict[str, Any]:
    """Compress from file to file; returns what `pipeline.run` does, but for what only a loaded model can tell."""
    settings, reader = job.part.config, job.reader
    form = {"shapes": reader.shapes, "pifa": settings.pifa, "allow_growth": settings.paper}
    own = Spectra(job.values, **form)
    plain = Spectra(job.given, **form) if job.given else own
    ranks = job.part.ranks(plain, own)
    report.check(job.part, plain, ranks)
    rows = report.rows(Targets({}, {}), ranks, plain, own)
    result = {
        "method": job.config.method, "run": str(folder.path), "model": str(folder.model), "weighting": "none",
        "calibration_text": None, "evaluation_text": None, **job.share.record(),
        **report.about(job.part, plain, ranks),
    }  # fmt: skip
    details = report.details(result)
    config = models.config_of(job.config.model, offline=job.config.common.offline)
    kind = "pifa" if settings.pifa else "factored"
    sizes = commit(folder.path, lambda path: write(reader, ranks, kind, path, config, details), folder.model)
    result["parameters_before"], result["parameters_after"] = sizes
    result["bytes_before"] = sum(path.stat().st_size for path in set(reader.files.values()))
    result["bytes_after"] = sum(p.stat().st_size for p in folder.model.glob("*.safetensors"))
    report.write(folder, rows, result, plots=job.config.compress.plots)
    return result


def write(
    reader: Reader, ranks: Ranks, form: str, folder: Path, config: PretrainedConfig, details: dict[str, Any]
) -> tuple[int, int]:
    """Write the compressed model into an empty folder: files of FILE_BYTES or more, index, configuration, the rest.

    Args:
        reader: of the model's files.
        ranks: of its linears.
        form: "factored" or "pifa".
        folder: where to; it exists.
        config: the model's.
        details: for config.json.
    Returns:
        Parameters before and after.
    """
    parts: list[list[str]] = []
    tensors: dict[str, Tensor] = {}
    before = after = 0
    keys = [key for layer in by_layer(reader) for key in layer]
    source = next(iter(reader.files.values())).parent

    def flush() -> None:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / _part(len(parts)), {"format": "pt"})
        parts.append([*tensors])
        tensors.clear()

    with progress("factoring", len(keys)) as advance:
        for key in keys:
            tensor = reader.tensor(key)
            before += tensor.numel()
            for name, value in compressed(reader, ranks, form, key, tensor):
                tensors[name] = value
                after += value.numel() if value.is_floating_point() else 0
            if sum(t.nbytes for t in tensors.values()) >= FILE_BYTES:
                flush()
            give_back()
            advance()
        if tensors:
            flush()
    shards: dict[str, str] = {}
    for number, names in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / _part(number), folder / name)
        shards |= dict.fromkeys(names, name)
    total = sum((folder / name).stat().st_size for name in set(shards.values()))
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    (folder / INDEX).write_text(dumps(index, indent=2) + "\n", encoding="utf-8")
    low = {name: rank for name, rank in ranks.items() if rank is not None}
    if low:
        config.quantization_config = LowRankConfig(ranks=low, form=form, details=details)
    config.save_pretrained(folder)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return before, after


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def compressed(reader: Reader, ranks: Ranks, form: str, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what one tensor of the model becomes: itself, the parts of its factored form, or nothing for a bias that
    goes with its weight."""
    if key in reader.stacks and ranks.get(key) is not None:
        pairs = [decompose(one.to(reader.device)).factors(one.to(reader.device), ranks[key]) for one in tensor]
        for part, factors in zip("AB", zip(*pairs, strict=True), strict=True):
            yield f"{key}.{part}", torch.stack(factors).to(tensor.dtype).cpu()
        return
    name, _, leaf = key.rpartition(".")
    rank = ranks.get(name)
    if rank is None or leaf not in ("weight", "bias"):
        yield key, tensor
        return
    if leaf == "bias":
        return
    # read once: a second mapping of the file would count once more
    weight = (tensor.mT if name in reader.transposed else tensor).to(reader.device)
    bias = None
    if f"{name}.bias" in reader.files:
        bias = reader.tensor(f"{name}.bias")
    m, n = weight.shape
    layer = FORMS[form](n, m, rank, bias is not None, dtype=tensor.dtype)
    layer.assign(*decompose(weight).factors(weight, rank), bias)
    for part, value in layer.state_dict().items():
        yield f"{name}.{part}", value


def by_layer(reader: Reader) -> list[list[str]]:
    """The keys of the files, those of a layer together, in order."""
    groups: dict[tuple[int, str], list[str]] = {}
    for key in sorted(reader.files):
        layer, within = place_of(key)
        # embeddings, head and final norm are each alone
        groups.setdefault((layer, "") if within != key else (-1, key), []).append(key)
    return [groups[place] for place in sorted(groups)]


def commit(folder: Path, write_into, final: Path) -> Any:
    """Call `write_into` with a temporary folder beside `final`, which gets that name when it is whole."""
    from lowrank_cli.train import checkpoint

    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        result = write_into(temporary)
        checkpoint.commit(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result
