"""An evaluation from its settings to its files: every task is looked up and read before the model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_cli import console
from lowrank_cli.config import RunConfig
from lowrank_cli.data.cache import is_offline
from lowrank_cli.data.tasks import TASKS
from lowrank_cli.errors import LowrankError, UsageError
from lowrank_cli.evaluate.names import MT_BENCH, PPL, check
from lowrank_cli.misfortune import check_writable

if TYPE_CHECKING:
    from lowrank_cli.evaluate.subject import Subject
    from lowrank_cli.models.load import Head


def names_of(text: str | None) -> list[str]:
    """The tasks that were typed, each once; raises UsageError if there are none."""
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    if not names:
        raise UsageError("no task to evaluate", "type: lowrank eval mmlu, or lowrank eval ppl, or both: mmlu,ppl")
    return names


def run(config: RunConfig, out: str | None) -> Iterator[tuple[dict[str, Any], Path]]:
    """The results of the tasks, each written as soon as it is there.

    Args:
        config: of the command eval.
        out: the folder for results; the model's run unless given.
    Yields:
        A result, and the file that it was written to.
    """
    settings, offline = config.harness, is_offline(config.common.offline)
    if offline:
        # before the libraries are imported, which read them once
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    names = names_of(settings.tasks)
    check(name for name in names if name not in TASKS)
    console.quiet_libraries()
    from lowrank_cli.evaluate import harness, mt_bench, tasks, text_perplexity

    batch_size = harness.batch_size_of(settings.batch_size)
    model, labels = _classifier(config, offline=offline)
    if labels:
        yield _labelled(config, out, names, labels, model, batch_size, offline=offline)
        return
    check(names)
    plain = [name for name in names if name not in (PPL, MT_BENCH)]
    loaded = {
        part.name: part
        for part in tasks.load(plain, settings.data_dir, offline=offline, num_fewshot=settings.num_fewshot)
    }
    text = text_perplexity.read_text(settings, offline=offline) if PPL in names else None
    questions = mt_bench.read_questions(settings.questions, settings.limit) if MT_BENCH in names else []
    subject, folder, suffix = _open(config, out, offline=offline)
    for name in names:
        if name == MT_BENCH:
            model_id = f"{folder.name}{suffix}"
            place = folder / "eval" / MT_BENCH / "model_answer" / f"{model_id}.jsonl"
            written = mt_bench.write_answers(
                subject,
                questions,
                place,
                max_new_tokens=settings.max_new_tokens,
                seed=config.common.seed,
                model_id=model_id,
                template=settings.template,
            )
            yield {"task": name, "num_questions": len(questions), "written_now": written, "answers": str(place)}, place
            continue
        if name == PPL:
            result = text_perplexity.evaluate(subject, text, settings, batch_size)
            result = {"task": PPL, **result, **harness.circumstances(subject)}
            answers, stem = [], text_perplexity.name_of(settings, result["window"])
        else:
            result, answers = harness.evaluate(subject, loaded[name], settings)
            stem = harness.name_of(loaded[name], settings)
        path = harness.save(result, answers, folder, stem + suffix, samples=settings.samples)
        console.note(f"{name}: {path}")
        yield result, path


def _open(config: RunConfig, out: str | None, *, offline: bool, head: Head | None = None) -> tuple[Subject, Path, str]:
    """Load the model; returns it with the folder of its results, which can be written to, and their names' end."""
    from lowrank_cli.evaluate.subject import open_subject, result_folder

    subject = open_subject(
        config.model,
        device=config.common.device,
        offline=offline,
        memory_budget=config.harness.memory_budget,
        seed=config.common.seed,
        head=head,
    )
    folder, suffix = result_folder(subject, out)
    check_writable(folder / "eval")
    return subject, folder, suffix


def _classifier(config: RunConfig, *, offline: bool) -> tuple[str, int]:
    """Return the model's name, and how many labels its head has: 0 for a language model.

    Raises:
        UsageError: a model of a kind that is not supported.
    """
    from lowrank_cli.models.load import labels_of
    from lowrank_cli.models.source import locate

    try:
        source = locate(config.model, offline=offline)
    except LowrankError:
        # what is wrong with the tasks or their data is said first, and this when the model's turn comes
        return "", 0
    return source.name, labels_of(source)


def _labelled(
    config: RunConfig, out: str | None, names: list[str], labels: int, model: str, batch_size: int | None, *,
    offline: bool,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """Evaluate a classifier on its own task."""
    from lowrank_cli.evaluate import harness, labelled

    settings, task = config.harness, labelled.task_of(names, labels, model)
    asked = labelled.examples(task, settings, offline=offline)
    subject, folder, suffix = _open(config, out, offline=offline, head=labelled.head(task))
    result, answers = labelled.evaluate(subject, task, asked, settings, batch_size)
    stem = labelled.name_of(task, settings) + suffix
    path = harness.save(result, answers, folder, stem, samples=settings.samples)
    console.note(f"{task.name}: {path}")
    return result, path


def plan(config: RunConfig) -> dict[str, Any]:
    """Return what would be evaluated, without loading the model: the model's name, and the size of each task."""
    settings, offline = config.harness, is_offline(config.common.offline)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from lowrank_cli.evaluate import harness, labelled, mt_bench, tasks, text_perplexity
    from lowrank_cli.models.source import locate

    names = names_of(settings.tasks)
    model, labels = _classifier(config, offline=offline)
    if labels:
        task = labelled.task_of(names, labels, model)
        return {"model": model, task.name: len(labelled.examples(task, settings, offline=offline))}
    plain = [name for name in names if name not in (PPL, MT_BENCH)]
    loaded = tasks.load(plain, settings.data_dir, offline=offline, num_fewshot=settings.num_fewshot)
    counts: dict[str, Any] = {part.name: harness.questions_in(part, settings.limit) for part in loaded}
    if PPL in names:
        text = text_perplexity.read_text(settings, offline=offline)
        counts[PPL] = f"{text.num_words} words of {text.name}"
    if MT_BENCH in names:
        counts[MT_BENCH] = len(mt_bench.read_questions(settings.questions, settings.limit))
    return {"model": locate(config.model, offline=offline).name, **counts}
