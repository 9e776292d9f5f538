"""From the names that a user types to lm-eval's task objects: local files, lm-eval's own tasks, nearest names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lowrank_cli import console
from lowrank_cli.errors import LowrankError, MissingError, UsageError
from lowrank_cli.evaluate import local_tasks
from lowrank_cli.evaluate.names import check, unknown_task
from lowrank_cli.evaluate.silence import quiet
from lowrank_cli.evaluate.suites import DEFAULT_SHOTS, SUITES, is_mmlu

# what lm-eval's tasks are on the hub, for the way out where there is no network
HUB_IDS = {
    "mmlu": "cais/mmlu", "boolq": "aps/super_glue", "gsm8k": "openai/gsm8k", "commonsense_qa": "tau/commonsense_qa",
    "wikitext": "EleutherAI/wikitext_document_level", "math500": "HuggingFaceH4/MATH-500",
    "strategyqa": "hails/bigbench", "bigbench_date": "hails/bigbench", "object_tracking": "hails/bigbench",
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """One name with its tasks.

    Attributes:
        name: as typed.
        task: lm-eval's name.
        content: what `TaskManager.load` gave: tasks and groups by name.
        manager: that loaded it.
        data: the local files with sizes and times; empty for a set of the hub.
    """

    name: str
    task: str
    content: dict[str, Any]
    manager: TaskManager
    data: list[list[Any]]

    @property
    def roots(self) -> list[Any]:
        """The groups that are in no other, or the tasks, where there are no groups."""
        groups = self.content.get("groups", {})
        inner = {child for children in self.content.get("group_map", {}).values() for child in children}
        return [group for name, group in groups.items() if name not in inner] or [*self.content["tasks"].values()]


def load(names: list[str], data_dir: str | None, *, offline: bool, num_fewshot: int | None) -> list[Loaded]:
    """The tasks of these names, with their data, in the order given.

    Args:
        names: suites, or any task, group or tag of lm-eval.
        data_dir: a folder with published files; sets that it holds are taken from there.
        offline: never touch the network.
        num_fewshot: examples in each prompt; None for the task's own number, 5 for MMLU.
    Raises:
        UsageError: an unknown name, or a broken record.
        MissingError: data that is not there, or not without a network.
    """
    folder, local = (None, {})
    if data_dir is not None:
        folder, local = local_tasks.write(names, Path(data_dir).expanduser())
    own = TaskManager(include_defaults=False, include_path=str(folder)) if local else None
    for name in names:
        if name in local:
            if local[name] not in own.all_tasks:
                raise unknown_task(name, own.all_tasks)
        elif name in local_tasks.OWN:
            raise MissingError(
                f"{name} is read from its published file, {SUITES[name].files['test'][0]}"
                + (f", and {data_dir} does not have it" if data_dir else ""),
                "give the folder that holds it: --data-dir FOLDER",
            )
        else:
            check([name])
    hub = _manager([name for name in names if name not in local])
    loaded = []
    for name in names:
        manager = own if name in local else hub
        if task_of(name) not in manager.all_tasks and name not in local:
            raise unknown_task(name, manager.all_tasks)
        task = local.get(name) or task_of(name)
        if name in SUITES and SUITES[name].note and name in local:
            console.note(f"{name}: {SUITES[name].note}")
        files = data_dir if name in local else None
        content = _content(manager, name, task, files, data_dir, offline)
        fixed = [part for part in content["tasks"].values() if part.get_config("num_fewshot") == 0]
        if num_fewshot and fixed:
            kept = f"{len(fixed)} of its tasks" if len(fixed) < len(content["tasks"]) else name
            console.warn(f"--num-fewshot {num_fewshot} is not for {kept}: lm-eval fixes no examples there")
        shots = DEFAULT_SHOTS.get("mmlu") if num_fewshot is None and is_mmlu(name) else num_fewshot
        for part in content["tasks"].values():
            # lm-eval's rule: a task that fixes 0 keeps it
            if shots is not None and part.get_config("num_fewshot") != 0:
                part.set_config("num_fewshot", shots)
            elif part.get_config("num_fewshot") is None:
                part.set_config("num_fewshot", 0)
        data = local_tasks.state_of(folder) if name in local else []
        loaded.append(Loaded(name, task, content, manager, data))
    return loaded


def _manager(names: list[str]) -> TaskManager | None:
    """lm-eval's own tasks: all of them, which takes seconds, or only the folders of names that are known here."""
    if not names:
        return None
    if not all(name in SUITES or is_mmlu(name) for name in names):
        return TaskManager()
    folders = {SUITES[name].folder if name in SUITES else "mmlu/default" for name in names}
    return TaskManager(
        include_defaults=False, include_path=[str(local_tasks.tasks_folder() / folder) for folder in sorted(folders)]
    )


def task_of(name: str) -> str:
    """lm-eval's name of a suite; other names are lm-eval's own."""
    return SUITES[name].task if name in SUITES and SUITES[name].task else name


def _content(
    manager: TaskManager, name: str, task: str, files: str | None, data_dir: str | None, offline: bool
) -> dict[str, Any]:
    """Load a task with its data, from the folder `files` or else from the hub."""
    try:
        with quiet():
            return manager.load([task])
    except LowrankError:
        raise
    except ImportError as error:
        raise MissingError(f"{name} needs a package: {error}", f"pip install {error.name or 'it'}") from None
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if files is not None:
            raise UsageError(f"the files of {name} in {files} cannot be read: {reason}", "get them again") from error
        hub = HUB_IDS.get(name) or ("cais/mmlu" if is_mmlu(name) else "its data set")
        where = f"{data_dir} has no files of {name}, and " if data_dir else ""
        missing = "the hub is not asked offline" if offline else f"the hub did not give it: {reason}"
        raise MissingError(
            f"{where}no data for {name}: {missing}",
            f"give its published files with --data-dir FOLDER, or fetch {hub} once with a network: "
            f"lowrank eval {name} --limit 1",
        ) from None
