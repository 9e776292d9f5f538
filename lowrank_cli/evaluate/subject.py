"""The model that is evaluated: where it is, whether it fits, what identifies it, and the run that it belongs to."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli import console, foreign
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import LowrankError, MissingError, PreflightError, UsageError
from lowrank_cli.evaluate.scoring import free_bytes
from lowrank_cli.fields import parse_bytes
from lowrank_cli.models import load
from lowrank_cli.models.source import Source, locate
from lowrank_cli.run import RUNS
from lowrank_cli.settings.common import SourceConfig

# the names that PEFT gives weights
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Subject:
    """A model on its device, in eval mode, with its tokenizer.

    Attributes:
        model: causal language model.
        tokenizer: the model's own.
        source: where both are from.
        digest: of the weights' files, or a hub id's commit.
        load_s: seconds that loading took.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    digest: str
    load_s: float

    def about(self) -> dict[str, Any]:
        """For a result's JSON."""
        parameters = sum(p.numel() for p in self.model.parameters())
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return {
            "source": self.source.name, "sha256": self.digest, "architecture": self.model.config.model_type,
            "parameters": parameters, "weights_bytes": weights, "dtype": str(self.model.dtype).removeprefix("torch."),
            "vocabulary": len(self.tokenizer), "load_s": round(self.load_s, 3),
        }  # fmt: skip


def open_subject(
    config: SourceConfig, *, device: str, offline: bool, memory_budget: str | None = None, seed: int = 0,
    head: load.Head | None = None,
) -> Subject:  # fmt: skip
    """Load a model for evaluation.

    Args:
        config: which, and in what dtype.
        device: cpu, cuda, cuda:1 or auto.
        offline: never touch the network.
        memory_budget: such as "24GB"; what is free on the device unless given.
        seed: for the loader; nothing is drawn when weights are complete.
        head: of a classifier.
    Raises:
        MissingError: no such model, or it has no tokenizer.
        PreflightError: its weights do not fit.
        UsageError: it cannot be loaded, or its tokenizer has neither a bos nor an eos token.
    """
    start = time.perf_counter()
    source = locate(config, offline=offline)
    place = load.device_of(device)
    dtype = load.dtype_of(config.dtype, place)
    check_fits(source, dtype, place, memory_budget)
    tokenizer = tokenizer_for(config, source, offline=offline, labelled=head is not None)
    if head is not None:
        head = replace(head, pad_token_id=tokenizer.pad_token_id)
    model = load.load(config, config=None, dtype=dtype, device=place, seed=seed, offline=offline, head=head).eval()
    load.check_vocabulary(model, tokenizer, training=False)
    console.note(f"model {source.name}: {console.human_count(model.num_parameters())} parameters, {dtype}, {place}")
    return Subject(model, tokenizer, source, digest(source), time.perf_counter() - start)


def check_fits(source: Source, dtype: torch.dtype, device: torch.device, budget: str | None) -> None:
    """Raise PreflightError if the files of the weights, in the given dtype, are larger than the memory for them."""
    files = weight_files(source)
    if not files:
        return
    # of files in another dtype the size says little: the tensors are counted where that is cheap
    needed = sum(_bytes_in(path, dtype) for path in files)
    room = parse_bytes(budget) if budget else free_bytes(device)
    if needed > room:
        where = f"--memory-budget {budget}" if budget else f"the {console.human_bytes(room)} that is free on {device}"
        raise PreflightError(
            f"the weights of {source.name} need {console.human_bytes(needed)}, more than {where}",
            ("--dtype bfloat16 halves it; " if dtype == torch.float32 else "")
            + "lowrank compress makes a smaller model; or take another --device",
        )


def _bytes_in(path: Path, dtype: torch.dtype) -> int:
    if path.suffix == ".gguf":
        # its weights are dequantized when they are loaded
        from gguf import GGUFReader

        with foreign.reading(path, "a GGUF file", "fetch it again"):
            return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors) * dtype.itemsize
    if path.suffix != ".safetensors":
        return path.stat().st_size
    try:
        with foreign.open_tensors(path) as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 not a dict
    except LowrankError:
        # a damaged file: loading says so
        return 0
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def tokenizer_for(
    config: SourceConfig, source: Source, *, offline: bool, labelled: bool = False
) -> PreTrainedTokenizerBase:
    """Return the model's own tokenizer as lm-eval would load it, or as fine-tuning does for `labelled` examples; one
    that names no special token has them guessed."""
    name = load.tokenizer_of(config)
    if name is None:
        raise MissingError(
            f"{source.name} has no tokenizer", "put the tokenizer's files (tokenizer.json) into the model's folder"
        )
    if not labelled and (Path(name).is_dir() or not Path(name).exists()):
        try:
            with foreign.reading(name, "a folder with a tokenizer", "copy or save the model again"):
                tokenizer = foreign.from_pretrained(
                    AutoTokenizer, name, local_files_only=offline or Path(name).is_dir()
                )  # fmt: skip
        except (UsageError, ImportError):
            tokenizer = None
        named = tokenizer is not None and (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
        if named and tokenizer.is_fast:
            return _with_end(tokenizer)
    return named_tokenizer(name, offline=offline)


def _with_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token_id is None:
        # lm-eval ends a generation at it
        tokenizer.eos_token = tokenizer.bos_token
    return tokenizer


def weight_files(source: Source) -> list[Path]:
    """The files of the weights, the adapter's among them; none for a hub id that is not here yet."""
    if source.gguf is not None:
        files = [Path(source.location) / source.gguf]
    else:
        files = _weights_in(Path(source.location)) if source.is_local else []
    return files if source.adapter is None else [*files, *_weights_in(Path(source.adapter))]


def _weights_in(folder: Path) -> list[Path]:
    # those that are loaded, of all that lie there
    adapter = next((folder / name for name in _ADAPTERS if (folder / name).is_file()), None)
    return foreign.weights_in(folder) if adapter is None else [adapter]


def digest(source: Source) -> str:
    """The SHA-256 of the weights' files; for a hub id its commit in the cache of this machine."""
    if not source.is_local:
        from huggingface_hub import snapshot_download

        return f"{source.location}@{Path(snapshot_download(source.location, local_files_only=True)).name}"
    total = hashlib.sha256()
    for path in weight_files(source):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def result_folder(subject: Subject, out: str | None) -> tuple[Path, str]:
    """Return the folder that results go to, and the suffix of their names.

    The folder is `out`; or the run that the model belongs to; or one under ./runs for this very model, the same each
    time, to which `runs/latest` does not point, since it holds no model. The suffix is the checkpoint's name, if the
    model is a checkpoint of a run; in `out` it also keeps the results of several models apart.
    """
    source = subject.source
    place = Path(source.adapter or source.location)
    part = f"@{place.name}" if place.parent.name == "checkpoints" else ""
    if out is not None:
        return Path(out), part or _apart(Path(out), subject, place.name)
    for folder in (place, *place.resolve().parents[:2]):
        if (folder / "run.json").is_file():
            return folder, part
    name = f"eval-{Path(source.gguf).stem if source.gguf else place.name}-{digest_key(subject.digest)}"
    earlier = sorted(RUNS.glob(f"*-{name}"))
    return earlier[-1] if earlier else RUNS / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{name}", ""


def _apart(folder: Path, subject: Subject, name: str) -> str:
    """Return a suffix that keeps results apart from another model's in the same folder; "" if none is needed."""
    for path in sorted((folder / "eval").glob("*.json")):
        try:
            model = foreign.read_json(path).get("model")
        except LowrankError:
            # not one of ours
            continue
        known = model.get("sha256") if isinstance(model, dict) else None
        if known != subject.digest and "@" not in path.stem:
            return f"@{name}-{digest_key(subject.digest)}"
    return ""


def digest_key(digest: str) -> str:
    """Eight hexadecimal digits of a digest or a commit."""
    return digest.rpartition("@")[2][:8]
