"""Tasks of lm-eval on local files: YAML that includes lm-eval's own task and changes only where its records are from.

So the prompts, the choices, the extraction of answers and the metrics are lm-eval's, and stay so when it changes. Two
sets that it does not have are defined here, in its terms.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lowrank_cli.data.cache import cached_folder, fingerprint
from lowrank_cli.errors import MissingError
from lowrank_cli.evaluate import published
from lowrank_cli.evaluate.suites import MMLU_PARTS, SUITES, Suite, files_of, is_mmlu, mmlu_folder

# a change of what is written below has to change the folder it is written to
FORMAT = 1
_NUMBER = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
OWN: dict[str, dict[str, Any]] = {
    "svamp": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{body}} {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [{**_NUMBER, "regexes_to_ignore": [",", "\\$", "\\.0*$"]}],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0},
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": "(-?[$0-9.,]*[0-9][$0-9.,]*)",
                    },
                    {"function": "take_first"},
                ],
            }
        ],
        "metadata": {"version": 1.0},
    },
    "coin_flip": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    },
}


def write(names: list[str], data_dir: Path) -> tuple[Path, dict[str, str]]:
    """Write the tasks of these names that the folder has files for.

    Args:
        names: suites, or MMLU with its groups and subjects.
        data_dir: the folder with published files.
    Returns:
        The folder of YAML files, for `TaskManager(include_path=...)`, and the task of each name that is in it.
    Raises:
        MissingError: there is no such folder, or a set is there in part.
    """
    if not data_dir.is_dir():
        raise MissingError(f"there is no folder {data_dir}", "give --data-dir the folder that holds the sets' files")
    wanted: dict[str, str] = {}
    documents: dict[str, str] = {}
    # a typo in a name is found by its caller: it is no suite and no part of MMLU
    folder = mmlu_folder(data_dir) if any(is_mmlu(name) for name in names) else None
    if folder is not None:
        documents |= _mmlu_documents(folder.resolve())
        wanted |= {name: name for name in names if is_mmlu(name)}
    for name in names:
        files = files_of(name, data_dir) if name in SUITES else None
        if files is not None:
            task = SUITES[name].task or name
            documents[task] = _document(name, task, files)
            wanted[name] = task

    def make(scratch: Path) -> None:
        for task, text in documents.items():
            (scratch / f"{task}.yaml").write_text(text, encoding="utf-8")

    key = fingerprint([FORMAT, metadata.version("lm_eval"), documents])
    return cached_folder("eval-tasks", key, make), wanted


def dataset(reader: str, files: dict[str, str], options: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """The splits of a local task as lm-eval takes them; named by the YAML as `custom_dataset`.

    Args:
        reader: of `evaluate.published`.
        files: by split.
        options: of the reader.
    Raises:
        UsageError: a record is broken.
        MissingError: a file is not there.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    splits = getattr(published, reader)(files, **(options or {}))
    return {split: Dataset.from_list(records) for split, records in splits.items() if records}


def state_of(folder: Path) -> list[list[Any]]:
    """The files that the tasks in a folder of YAML read, with sizes and times: what their requests depend on."""
    found = set()
    for path in folder.glob("*.yaml"):
        # the tags of functions are no YAML for a plain loader: the line is JSON, and is looked for
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("dataset_kwargs: "):
                found |= set(json.loads(line.partition(": ")[2])["files"].values())
    stats = [(file, Path(file).stat()) for file in sorted(found) if Path(file).is_file()]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def subjects() -> list[str]:
    """The 57 subjects of MMLU, as lm-eval lists them."""
    return [name for name in _mmlu_yaml() if not name.startswith("_")]


def _mmlu_documents(folder: Path) -> dict[str, str]:
    documents = {}
    for name, path in _mmlu_yaml().items():
        if name.startswith("_"):
            documents["mmlu" if name == "_mmlu" else name[1:]] = f"include: {json.dumps(str(path))}\n"
            continue
        files = {split: folder / part / f"{name}_{part}.csv" for part, split in MMLU_PARTS.items()}
        # the questions and the examples have to be there, and their absence is an error when they are read
        kept = {s: str(f) for s, f in files.items() if s != "validation" or f.is_file()}
        documents[f"mmlu_{name}"] = _yaml(path, "mmlu", kept, {"subject": name}, {})
    return documents


@cache
def _mmlu_yaml() -> dict[str, Path]:
    """lm-eval's files of MMLU: subjects by name, and groups by name with an underscore."""
    folder = tasks_folder() / "mmlu" / "default"
    return {path.stem.removeprefix("mmlu_"): path for path in sorted(folder.glob("*.yaml"))}


def _document(name: str, task: str, files: dict[str, str]) -> str:
    suite = SUITES[name]
    settings = dict(suite.settings)
    if name in OWN:
        return _yaml(None, suite.reader, files, suite.options, {"task": name, **OWN[name], **settings})
    if "train" in suite.files and "train" not in files:
        # lm-eval then takes its examples from the evaluated part, without the question itself
        settings["training_split"] = None
    return _yaml(_own_yaml(suite, task), suite.reader, files, suite.options, settings)


def _own_yaml(suite: Suite, task: str) -> Path:
    """lm-eval's file of a task."""
    for path in sorted((tasks_folder() / suite.folder).rglob("*.yaml")):
        if f"task: {task}\n" in path.read_text(encoding="utf-8") + "\n":
            return path
    raise MissingError(
        f"lm-eval {metadata.version('lm_eval')} has no task {task}", "pip install 'lm-eval>=0.4.9,<0.5'"
    )


def _yaml(include: Path | None, reader: str, files: dict[str, str], options: dict, settings: dict) -> str:
    lines = [] if include is None else [f"include: {json.dumps(str(include))}"]
    lines.append(f"custom_dataset: !function {__name__}.dataset")
    lines.append(f"dataset_kwargs: {json.dumps({'reader': reader, 'files': files, 'options': options})}")
    return "\n".join(lines) + "\n" + (yaml.safe_dump(settings, sort_keys=False) if settings else "")


def tasks_folder() -> Path:
    """The folder of lm-eval's own tasks.

    Raises:
        MissingError: it is not installed.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("lm-eval is not installed", "pip install 'lm-eval[hf]'")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"
