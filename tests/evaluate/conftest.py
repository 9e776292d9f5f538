"""The tests of evaluation share a small model, records read without the code that is tested, and lm-eval by hand."""

import csv
import json

import pytest


@pytest.fixture(scope="session")
def subject(stories):
    """Return the model that has learned made stories, loaded."""
    from lowrank_cli.evaluate.subject import open_subject
    from lowrank_cli.settings.common import SourceConfig

    return open_subject(SourceConfig(name=str(stories)), device="cpu", offline=True)


@pytest.fixture(scope="session")
def raw():
    """Read the records of a file as anybody would: raw(path) -> rows or objects."""

    def read(path):
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.reader(file))
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)

    return read


@pytest.fixture(scope="session")
def by_hand():
    """Load lm-eval's own tasks below a folder of its YAML, on records of the hub's columns instead of a download.

    The records are of each split, or by the name of the subset, which lm-eval calls dataset_name.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    from lowrank_cli.evaluate.local_tasks import tasks_folder

    def load(folder: str, name: str, records: dict):
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
    """Return the requests that lm-eval makes of tasks, with its default seed."""

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
