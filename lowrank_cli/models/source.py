"""Find a model's weights: a Hugging Face folder, a run folder, a GGUF file, an adapter, or an id on the hub."""

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lowrank_cli import foreign
from lowrank_cli.errors import MissingError, UsageError
from lowrank_cli.models import presets
from lowrank_cli.settings.training import ModelConfig

LATEST_RUN = Path("runs/latest")
ADAPTER = "adapter_config.json"
# of checkpoints that several processes have written together
CUT = "sharded"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Source:
    """A place that `from_pretrained` can load from."""

    location: str  # a folder with a config.json, a folder with the GGUF file, or a hub id
    is_local: bool
    gguf: str | None = None  # the name of the GGUF file in that folder
    adapter: str | None = None  # a folder with a PEFT adapter for these weights

    @property
    def arguments(self) -> dict:
        """Return the keyword arguments that `from_pretrained` needs beside the location."""
        file = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"local_files_only": self.is_local, **file}

    @property
    def name(self) -> str:
        """The place as a user would give it."""
        return self.adapter or (self.location if self.gguf is None else str(Path(self.location) / self.gguf))


def locate(model: ModelConfig, *, offline: bool) -> Source:
    """The place of the weights that `continue_from` or `name` says; the newest run without either.

    A run folder stands for its `model/`, or, while it has none, for its newest checkpoint.

    Raises:
        UsageError: two places, a file, a preset (which has no weights), or a folder that holds no model.
        MissingError: no such folder, a run without a model, or a hub id that is not cached while offline.
    """
    if model.continue_from is not None and model.name is not None:
        raise UsageError(
            f"--model {model.name} and --continue-from {model.continue_from} both name a model",
            "leave one of them out",
        )
    given = model.continue_from if model.continue_from is not None else model.name
    if given is None:
        if not LATEST_RUN.exists():
            raise MissingError(
                "no model given, and no run under ./runs to take it from",
                "add --model FOLDER, or train one first: lowrank pretrain --method galore",
            )
        given = str(LATEST_RUN)
    return place(given, offline=offline)


def place(given: str, *, offline: bool) -> Source:
    """The place of the weights that a folder, a run, a .gguf file, an adapter's folder or a hub id names.

    Raises:
        UsageError, MissingError: as `locate`.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        folder = _model_folder(path)
        return _with_adapter(folder, offline) if (folder / ADAPTER).is_file() else Source(str(folder), is_local=True)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingError(f"no file {given}", "give the path of a GGUF file")
        foreign.check_gguf(path)
        return Source(str(path.parent), is_local=True, gguf=path.name)
    if path.exists():
        raise UsageError(
            f"{given} is a file", "give a .gguf file, or the folder that holds config.json and the weights"
        )
    if given in presets.names():
        raise UsageError(
            f"{given} is a preset: a shape without weights",
            f"train it first (lowrank pretrain --model {given}), or give a folder, a run or a hub id",
        )
    _check_hub_id(given)
    return Source(_cached(given), is_local=True) if offline else Source(given, is_local=False)


def tokenizer_of(model: ModelConfig) -> str | None:
    """The folder (or the hub id) whose tokenizer belongs to the weights; None if they bring none."""
    is_architecture = model.continue_from is None and (model.model_config is not None or model.name in presets.names())
    nothing_given = model.continue_from is None and model.name is None and not LATEST_RUN.exists()
    if nothing_given or (is_architecture and not Path(model.name or "").is_dir()):
        return None
    source = locate(model, offline=False)
    if source.adapter is not None and any((Path(source.adapter) / name).is_file() for name in _TOKENIZER_FILES):
        return source.adapter
    if source.gguf is not None:
        return source.name if source.adapter is None else str(Path(source.location) / source.gguf)
    if not source.is_local:
        return source.location
    has_tokenizer = any((Path(source.location) / name).is_file() for name in _TOKENIZER_FILES)
    return source.location if has_tokenizer else None


def _with_adapter(folder: Path, offline: bool) -> Source:
    """An adapter's folder as the base that it names and itself."""
    path, hint = folder / ADAPTER, "write its base_model_name_or_path: the folder or the hub id of the base model"
    base = foreign.entry(foreign.read_json(path, hint=hint), "base_model_name_or_path", str, path, hint)
    if not base.strip():
        raise UsageError(f"{path} names no base model", hint)
    if (local := Path(base).expanduser()).is_dir() and (_model_folder(local) / ADAPTER).is_file():
        raise UsageError(
            f"{path} names {base} as its base model, which is an adapter itself",
            "merge that one into its base first (its finetune command with --merge), and name the merged model",
        )
    try:
        return replace(place(base, offline=offline), adapter=str(folder))
    except MissingError as error:
        raise MissingError(
            f"the base model of the adapter {folder} is not there: {error.message}", error.hint
        ) from None


def _model_folder(path: Path) -> Path:
    """The folder with the model or the adapter: the path itself, or the place in a run folder."""
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        return path
    if (path / CUT).is_dir():
        raise UsageError(
            f"{path} is a checkpoint of weights that were cut over processes, and no model yet",
            f"let the run end, which writes its model: --resume {path}",
        )
    if (path / "run.json").is_file():
        found = [path / "model", *_checkpoints(path)]
        for folder in found:
            if (folder / "config.json").is_file() or (folder / ADAPTER).is_file():
                return folder
        if len(found) > 1:
            # an adapter's have no base with them, those of weights that were cut are in parts
            raise UsageError(
                f"run {path} has not ended, and its checkpoints are no models by themselves",
                f"let it end, which writes its model: --resume {path}",
            )
        raise MissingError(
            f"run {path} has no model and no checkpoint yet",
            "wait for its first checkpoint, or take another run: --model runs/NAME",
        )
    raise UsageError(
        f"{path} holds no model: neither config.json nor run.json is in it",
        "give a Hugging Face folder or a run folder",
    )


def _checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first; half-written ones have another name and are not among them."""
    steps = {p: m for p in (run / "checkpoints").glob("step-*") if (m := _CHECKPOINT.fullmatch(p.name))}
    return sorted(steps, key=lambda p: int(steps[p][1]), reverse=True)


def _check_hub_id(given: str) -> None:
    """Raise for what cannot be an id on the hub, and so was meant as a folder or a preset."""
    looks_local = given.startswith((".", "~", "/", "runs/")) or os.sep + os.sep in given or given.count("/") > 1
    close = [] if "/" in given else get_close_matches(given, presets.names(), n=1, cutoff=0.7)
    if close:
        raise UsageError(
            f"no folder and no preset '{given}'", f"did you mean '{close[0]}'? it is for lowrank pretrain"
        )
    if not looks_local:
        try:
            validate_repo_id(given)
        except HFValidationError:
            looks_local = True
    if looks_local:
        raise MissingError(
            f"no folder {given}", "give a Hugging Face folder, a run folder such as runs/latest, or a hub id"
        )


def _cached(hub_id: str) -> str:
    """The folder of a hub model in the cache of this machine."""
    try:
        folder = snapshot_download(hub_id, local_files_only=True)
    except LocalEntryNotFoundError:
        folder = None
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise MissingError(
            f"{hub_id} is not a folder here, and not in the cache, which is all there is offline",
            f"leave out --offline, or fetch it where there is a network (hf download {hub_id}) and give the folder",
        )
    return folder
