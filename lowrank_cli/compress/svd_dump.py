"""The singular values of every matrix of a model, and of the mean gradient on text: files and pictures.

Weights are read one after the other, from the safetensors files where the model has them under its own names, so that
a model much larger than memory can be read. Values are cached by the content of the weight.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lowrank_cli import console, foreign
from lowrank_cli.compress import files
from lowrank_cli.compress.decomposition import find_targets
from lowrank_cli.compress.progress import progress
from lowrank_cli.compress.text import batched, text_of_run, tokenizer_for, window_length, windows
from lowrank_cli.config import RunConfig
from lowrank_cli.data.cache import cached_folder
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.models import load as models
from lowrank_cli.models import quantized
from lowrank_cli.models.lowrank_linear import shape_of, weight_of
from lowrank_cli.models.source import Source, locate
from lowrank_cli.models.targets import Matrix
from lowrank_cli.ops.finite import refuse_non_finite
from lowrank_cli.run import RunDir, write_json
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.svd.spectrum import effective_rank, singular_values

# changes when the same weight would give other values
METHOD = "eigenvalues of the Gram matrix in float64"
# in a folder of the cache
VALUES = "values.safetensors"
# rows of a weight that are hashed at a time
HASHED_ROWS = 256


class Reader:
    """The weights of a model's linears by name, (out, in), and of experts, (E, m, n), read when asked for.

    Args:
        source: where the model is.
        config: the run's settings.
        loading: whether a model whose files cannot be read by the names of its code is loaded as a whole; without,
            it is left at no `files`.
    """

    def __init__(self, source: Source, config: RunConfig, *, loading: bool = True):
        self.config, self.source = config, source
        self.device = models.device_of(config.common.device)
        self.model: nn.Module | None = None
        # before any weight: a kind of model that is not supported
        self.architecture = None if source.gguf else models.config_of(config.model, offline=config.common.offline)
        self.files = self.index(source)
        self.has_head = False  # the files' names are those of the language model, not of the model inside it
        for skeleton in self.skeletons() if self.files else ():
            linears = find_targets(skeleton).linears
            self.stacks = {name for name, m in linears.items() if isinstance(m, Matrix)}
            if all(self.key_of(name) in self.files for name in linears) and self.are_as_stored(skeleton):
                self.has_head = type(skeleton) in MODEL_FOR_CAUSAL_LM_MAPPING.values()
                self.shapes = {name: shape_of(module) for name, module in linears.items()}
                self.transposed = {
                    name for name, m in linears.items() if name not in self.stacks and not hasattr(m, "out_features")
                }
                return
        self.files = {}
        if loading:
            self.load()

    def key_of(self, name: str) -> str:
        """The name of a weight in the files."""
        return name if name in self.stacks else f"{name}.weight"

    def are_as_stored(self, skeleton: nn.Module) -> bool:
        """Return whether Transformers reads experts from the files as they are: it may merge, split or turn them."""
        if not self.stacks:
            return True
        conversions = get_model_conversion_mapping(skeleton)
        changed = any(c.rename_source_key(key)[1] is not None for key in self.files for c in conversions)
        return not changed and set(self.files) <= set(skeleton.state_dict())

    def skeletons(self) -> Iterator[nn.Module]:
        """The language model of the configuration, and the model without a head, such as a plain BERT; on meta."""
        if type(self.architecture) in MODEL_FOR_CAUSAL_LM_MAPPING:
            yield models.meta(self.architecture)
        with torch.device("meta"):
            yield AutoModel.from_config(self.architecture)

    def load(self) -> nn.Module:
        """The whole model, for what the files cannot give."""
        if self.model is None:
            config = self.config
            self.model = models.load(
                config.model,
                config=None,
                dtype=models.dtype_of(config.model.dtype, self.device),
                device=self.device,
                seed=config.common.seed,
                offline=config.common.offline,
            ).eval()
            self.files = {}
            self.linears = find_targets(self.model).linears
            self.shapes = {name: shape_of(module) for name, module in self.linears.items()}
        return self.model

    @staticmethod
    def index(source: Source) -> dict[str, Path]:
        """The safetensors file of each tensor; empty if there are none."""
        if source.gguf or source.adapter or not source.is_local:
            return {}
        folder = Path(source.location)
        config = foreign.check_model(folder)
        paths = foreign.weights_in(folder)
        # weights in files of other names, and codes that are dequantized on loading, are left to Transformers
        if config.get("transformers_weights") or quantized.quantization(config) in quantized.DEQUANTIZED:
            return {}
        if any(path.suffix != ".safetensors" for path in paths):
            return {}
        found = {}
        for path in paths:
            with foreign.open_tensors(path) as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def tensor(self, key: str) -> Tensor:
        """Return a tensor of the files."""
        with foreign.open_tensors(self.files[key]) as file:
            return file.get_tensor(key)

    def check(self) -> None:
        """Read every tensor of the files once, before anything is written; a model that was loaded is checked.

        Raises:
            UsageError: one holds a value that is not finite.
        """
        for key in self.files:
            refuse_non_finite(self.source.name, [(key, self.tensor(key))])
        give_back()

    def __getitem__(self, name: str) -> Tensor:
        if not self.files:
            return weight_of(self.linears[name]).detach()
        weight = self.tensor(self.key_of(name))
        weight = weight.mT if name in self.transposed else weight
        if tuple(weight.shape) != self.shapes[name]:
            raise UsageError(
                f"{self.key_of(name)} is {' x '.join(map(str, weight.shape))} in the file, and the configuration says "
                f"{' x '.join(map(str, self.shapes[name]))}",
                "its weights and its config.json are not of the same model",
            )
        # decomposed where the model would run
        return weight.to(self.device)


def cached_values(weight: Tensor) -> Tensor:
    """The singular values of a weight, out of the cache if this very weight has been decomposed before."""
    weight = weight.detach()
    stack = weight if weight.dim() == 3 else weight[None]
    digest = hashlib.sha256(f"{METHOD} {tuple(weight.shape)}".encode())
    for one in stack:
        for rows in one.split(HASHED_ROWS):
            # the same numbers in 16 bits and in 32 are the same weight
            digest.update(rows.float().cpu().contiguous().view(torch.uint8).numpy())

    def make(folder: Path) -> None:
        (folder / VALUES).write_bytes(save({"values": values_of_stack(weight).cpu()}))

    folder = cached_folder("spectra", digest.hexdigest()[:32], make)
    return foreign.read_tensors(folder / VALUES)["values"]


def values_of_stack(weight: Tensor) -> Tensor:
    """The singular values of (m, n), as (k,), or of each matrix of (E, m, n), as (E, k)."""
    return singular_values(weight) if weight.dim() == 2 else torch.stack([singular_values(one) for one in weight])


def values_of(reader: Reader) -> dict[str, Tensor]:
    """The singular values of every linear, read one after the other."""
    found = {}
    with progress("singular values", len(reader.shapes)) as advance:
        for name in reader.shapes:
            found[name] = cached_values(reader[name])
            give_back()
            advance()
    return found


def give_back() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MB, and those of many weights add up."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none and need none
        if trim is not None:
            trim(0)


@dataclass
class Dump:
    """A Dump holds what `run` needs to write a model's spectra, checked before anything is written."""

    config: RunConfig
    reader: Reader
    text: list[Tensor]


def prepare(config: RunConfig) -> Dump:
    """Find the weights and the text; whatever is wrong with them shows here."""
    console.quiet_libraries()
    source = locate(config.model, offline=config.common.offline)
    reader = Reader(source, config)
    if config.spectra.published and len({files.place_of(name) for name in reader.shapes}) < len(reader.shapes):
        raise UsageError(
            "--published has one stack of layers, and this model has two whose linears have the same names",
            "drop it: singular_values.safetensors has every linear by its full name",
        )
    return Dump(config, reader, text_windows(config, reader, source))


def run(dump: Dump, folder: RunDir) -> dict[str, Any]:
    """Write a model's spectra into a run folder.

    Returns:
        Where the files are, and the mean effective rank.
    """
    config, reader, values = dump.config, dump.reader, values_of(dump.reader)
    result = {"run": str(folder.path), "linears": len(values)}
    result |= write(folder, "singular_values", values, reader.shapes, "weights", config.spectra.plots)
    if config.spectra.published:
        files.write_published(folder.path / files.PUBLISHED, values)
        result["published"] = str(folder.path / files.PUBLISHED)
    if dump.text:
        gradients = {name: values_of_stack(g).cpu() for name, g in mean_gradients(reader.load(), dump.text)}
        result |= write(
            folder, "gradient_singular_values", gradients, reader.shapes, "gradients", config.spectra.plots
        )
        result["gradient_windows"] = sum(ids.shape[0] for ids in dump.text)
    write_json(folder.path / "result.json", result)
    return result


def summary(result: dict[str, Any]) -> str:
    """The result as a few lines for people."""
    lines = [f"{result['linears']} matrices, mean effective rank "
             f"{100 * result['mean_effective_rank_share_of_weights']:.0f} % of the full one"]  # fmt: skip
    if "gradients" in result:
        share = result["mean_effective_rank_share_of_gradients"]
        lines.append(f"gradients over {result['gradient_windows']} windows: {100 * share:.0f} %")
    return "\n".join([*lines, f"files and plots: {result['run']}"])


def text_windows(config: RunConfig, reader: Reader, source: Source) -> list[Tensor]:
    """The text whose gradients are wanted; none without --gradients."""
    if not config.spectra.gradients:
        return []
    offline = config.common.offline
    trained = text_of_run(source)
    own = None if config.spectra.dataset else trained
    text = own or DataConfig(**({"dataset": config.spectra.dataset} if config.spectra.dataset else {}))
    model = reader.load()
    tokenizer = tokenizer_for(source, model, offline, needed=True)
    length = window_length(model.config, config.spectra.max_length, trained)
    rows = windows(
        text, "train", tokenizer, length=length, count=config.spectra.gradients, offline=offline,
        flag="--dataset", whole=own is None,
    )  # fmt: skip
    return batched(rows)


def mean_gradients(model: nn.Module, text: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The gradient of the mean loss over all windows, of each linear, (out, in), and of experts, (E, m, n)."""
    linears = find_targets(model).linears
    asked = [p for p in model.parameters() if p.requires_grad]
    wanted = {module.weight for module in linears.values()}
    for p in asked:
        p.requires_grad_(p in wanted)
    device = next(model.parameters()).device
    targets = sum(ids[:, 1:].numel() for ids in text)
    try:
        with progress("gradients", len(text)) as advance:
            for ids in text:
                ids = ids.to(device)
                embedded = model.get_input_embeddings()(ids).detach()
                logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                (F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / targets).backward()
                advance()
        for name, module in linears.items():
            if module.weight.grad is None or not bool(torch.isfinite(module.weight.grad).all()):
                raise MissingError(f"{name} got no finite gradient on this text", "use --dtype float32")
            grad = module.weight.grad
            yield name, grad if isinstance(module, Matrix) or hasattr(module, "out_features") else grad.mT
    finally:
        for p in asked:
            p.requires_grad_(True)
            p.grad = None


def write(
    folder: RunDir, stem: str, values: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], what: str, plots: bool
) -> dict[str, Any]:
    """The files and pictures of one set of values."""
    files.write_spectra(folder.path, values, shapes, stem)
    # of experts the mean of theirs
    shares = {name: sum(map(effective_rank, v.reshape(-1, v.shape[-1]))) / v.numel() for name, v in values.items()}
    if plots:
        from lowrank_cli.compress import pictures

        folder.plots.mkdir(exist_ok=True)
        pictures.curves(folder.plots / f"{stem}.png", values, title=f"Normalised singular values of the {what}")
        pictures.heat_map(
            folder.plots / f"effective_rank{'' if what == 'weights' else '_gradients'}.png",
            shares,
            title=f"Effective rank of the {what}",
            label="effective rank / full rank",
        )
    return {
        f"{what}": str(folder.path / f"{stem}.safetensors"),
        f"mean_effective_rank_share_of_{what}": sum(shares.values()) / len(shares),
    }
