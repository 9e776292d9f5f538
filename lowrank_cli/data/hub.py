"""Documents of a data set on the Hugging Face hub, streamed: nothing is downloaded whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import HTTPError

from lowrank_cli.data.cache import is_offline
from lowrank_cli.data.documents import Source, keeps, no_documents
from lowrank_cli.data.records import text_of, translated
from lowrank_cli.errors import LowrankError, MissingError, UsageError, unknown

DEFAULT_CONFIGS = {"allenai/c4": "en"}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")


class HubSource(Source):
    """The documents of a hub data set's part, read over the network as they are needed.

    The position is that of ``datasets.IterableDataset.state_dict`` and the number of the next document.

    Args:
        dataset: hub id.
        dataset_config: configuration, such as "en"; allenai/c4 has en by default.
        text_field: the column of the text.
        part: "train" or "validation".
        otherwise: "held_out": without a validation split every 20th document of train is it; "all": then all are.
        offline: use what the datasets cache holds, or fail.
    Raises:
        MissingError: no such data set, or no way to reach it.
        UsageError: no such configuration, or one has to be named.
    """

    local = False

    def __init__(
        self, dataset: str, dataset_config: str | None, text_field: str, part: str, *, otherwise: str, offline: bool
    ):
        dataset_config = dataset_config or DEFAULT_CONFIGS.get(dataset)
        self.name, self.text_field = f"{dataset} ({part})", text_field
        splits = _splits(dataset, dataset_config, offline)
        validation = next((split for split in VALIDATION_SPLITS if split in splits), None)
        if part == "validation" and validation is not None:
            split, self.held_out = validation, None
        elif "train" in splits:
            held_out = otherwise == "held_out" and validation is None
            split, self.held_out = "train", part if held_out else None
        else:
            raise UsageError(
                f"{dataset} has no train split; splits: {', '.join(sorted(splits))}", "choose a data set with one"
            )
        self.identity = ["hub", dataset, dataset_config, split, text_field, self.held_out]
        self._documents = splits[split]
        self.load_state_dict({})

    def difference(self, saved: Any) -> str:
        if len(saved) != len(self.identity) or saved[0] != "hub":
            return f"{self.name} instead of files"
        names = ("", "dataset", "configuration", "split", "text field", "held-out part")
        pairs = zip(names, saved, self.identity, strict=True)
        return ", ".join(f"{name} {now} instead of {before}" for name, before, now in pairs if now != before)

    def __iter__(self) -> Iterator[str]:
        found = self._document > 0
        self._documents.load_state_dict(self.state_dict()["datasets"])
        errors = (OSError, HTTPError, datasets.exceptions.DatasetsError, ValueError)
        for record in translated(iter(self._documents), errors, self._broken):
            text = text_of(record, self.text_field, f"{self.name}, document {self._document + 1}")
            self._document += 1
            self._loaded = None
            if text and text.strip() and keeps(self.held_out, self._document - 1):
                found = True
                yield text
        count = self._document
        self.load_state_dict({})
        if not found:
            raise no_documents(self.name, self.held_out, count)

    def state_dict(self) -> dict[str, Any]:
        if self._document == 0:
            return {"document": 0, "datasets": None}
        # datasets knows a position only once it has read from it
        position = self._documents.state_dict() if self._loaded is None else deepcopy(self._loaded)
        return {"document": self._document, "datasets": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._document, self._loaded = state.get("document", 0), state.get("datasets")

    def _broken(self, error: Exception) -> LowrankError:
        if isinstance(error, (OSError, HTTPError)):
            return LowrankError(
                f"reading {self.name} failed after {self._document:,} documents: {_line(error)}",
                "check the network and continue the run with --resume auto",
            )
        return UsageError(
            f"{self.name} cannot be read as text: {_line(error)}", "choose another --dataset or --dataset-config"
        )


def whole(dataset: str, dataset_config: str | None, *, offline: bool) -> dict[str, datasets.Dataset]:
    """The splits of a data set by name, downloaded whole into the cache of `datasets`; raises as HubSource does."""
    offline = is_offline(offline)
    try:
        with _no_network(offline):
            return dict(datasets.load_dataset(dataset, dataset_config))
    except (OSError, HTTPError, datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise _load_error(dataset, dataset_config, offline, error) from error


def _splits(dataset: str, dataset_config: str | None, offline: bool) -> dict[str, datasets.IterableDataset]:
    offline = is_offline(offline)
    try:
        with _no_network(offline):
            loaded = datasets.load_dataset(dataset, dataset_config, streaming=not offline)
            return {name: part.to_iterable_dataset() if offline else part for name, part in loaded.items()}
    except (OSError, HTTPError, datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise _load_error(dataset, dataset_config, offline, error) from error


def _load_error(dataset: str, dataset_config: str | None, offline: bool, error: Exception) -> LowrankError:
    if offline:
        return MissingError(
            f"{dataset} is not in the cache and the run is offline",
            "run once without --offline and HF_HUB_OFFLINE, or give local files with --dataset",
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return MissingError(
            f"the hub has no data set '{dataset}' that you may read",
            "check the id, or log in with `hf auth login` if it is private or gated",
        )
    if isinstance(error, ValueError) and "BuilderConfig" in str(error) and dataset_config:
        configs = str(error).rpartition("Available: ")[2].strip(" []").replace("'", "").split(", ")
        return unknown("configuration", dataset_config, configs, "--dataset-config")
    if isinstance(error, (ValueError, RuntimeError, datasets.exceptions.DatasetsError)):
        return UsageError(f"{dataset} cannot be loaded: {_line(error)}", "see --dataset-config, or give local files")
    return MissingError(
        f"{dataset} cannot be reached: {_line(error)}",
        "check the network, or give local files with --dataset; stdlib is always there",
    )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _no_network(offline: bool) -> Iterator[None]:
    # both libraries read the environment when they are imported, which was before --offline was known
    places = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place, value in zip(places, before, strict=True):
        place.HF_HUB_OFFLINE = offline or value
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
