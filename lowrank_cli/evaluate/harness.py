"""Evaluation by lm-eval: one call of `simple_evaluate` for each name, resumed where an earlier one was interrupted."""

from __future__ import annotations

import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.caching.cache
import torch
from lm_eval import simple_evaluate

from lowrank_cli import console
from lowrank_cli.data.cache import cache_dir, fingerprint
from lowrank_cli.errors import PreflightError, UsageError
from lowrank_cli.evaluate.lm import EvaluatedLM
from lowrank_cli.evaluate.progress import Progress
from lowrank_cli.evaluate.report import rows_of
from lowrank_cli.evaluate.silence import quiet
from lowrank_cli.evaluate.subject import Subject
from lowrank_cli.evaluate.tasks import Loaded
from lowrank_cli.misfortune import writing
from lowrank_cli.run import git_commit, now, peak_resident_bytes, versions, write_json
from lowrank_cli.settings.evaluate import HarnessConfig
from lowrank_cli.strict_json import dumps

# lm-eval's defaults, so that a run by hand draws the same examples
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}


def batch_size_of(text: str) -> int | None:
    """The number, or None for auto; raises UsageError."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size is {text!r}", "give a number of at least 1, or auto")
    return int(text)


def evaluate(subject: Subject, loaded: Loaded, settings: HarnessConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a model on the tasks of one name.

    Answers are kept in the cache as they come, and the next call that asks the same model the same questions goes on
    from them; they are dropped once the result is whole. Prompts are kept too, where all questions are asked.

    Args:
        subject: the model.
        loaded: the tasks.
        settings: limit, batch_size, max_length, chat_template, share_prefixes and fresh are used.
    Returns:
        The result as its JSON has it, and every answer.
    Raises:
        PreflightError: one question alone does not fit in memory.
    """
    start = time.perf_counter()
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    kept = _answers_folder(subject, loaded, settings)
    if settings.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    resumed = (kept / "answers_rank0.db").is_file()
    if resumed:
        console.note(f"{loaded.name}: answers of an interrupted evaluation are taken over; --fresh forgets them")
    with Progress(loaded.name) as progress, quiet():
        lm = EvaluatedLM(
            subject.model,
            subject.tokenizer,
            batch_size=batch_size_of(settings.batch_size),
            max_length=settings.max_length,
            progress=progress,
            share=settings.share_prefixes,
        )
        lm_eval.caching.cache.PATH = str(_prompts_folder(loaded))
        console.note(f"{loaded.name}: {questions_in(loaded, settings.limit):,} questions")
        try:
            output = simple_evaluate(
                model=lm,
                tasks=loaded.roots,
                task_manager=loaded.manager,
                limit=settings.limit,
                use_cache=str(kept / "answers"),
                # all prompts are made where they are kept, which a few questions do not need
                cache_requests=settings.limit is None and not settings.chat_template,
                apply_chat_template=settings.chat_template,
                bootstrap_iters=100_000,
                random_seed=SEEDS["random"],
                numpy_random_seed=SEEDS["numpy"],
                torch_random_seed=SEEDS["torch"],
                fewshot_random_seed=SEEDS["fewshot"],
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise PreflightError(
                f"one question of {loaded.name} does not fit in the memory of {device} beside the model",
                "take --dtype bfloat16, a smaller --max-length, or another --device",
            ) from None
    seconds = time.perf_counter() - start
    truncated = lm.num_truncated
    lm.cache_hook.close()
    shutil.rmtree(kept, ignore_errors=True)
    if truncated:
        console.warn(
            f"{loaded.name}: {truncated:,} contexts were longer than the model's {lm.max_length} tokens and "
            "lost their beginning"
        )
    rows = rows_of(output)
    result = {
        "task": loaded.name,
        "lm_eval_task": loaded.task,
        "rows": rows,
        "num_questions": sum(n["effective"] for n in output["n-samples"].values()),
        "num_truncated": truncated,
        "num_fewshot": output["n-shot"],
        "task_versions": output["versions"],
        "settings": {
            "limit": settings.limit, "batch_size": settings.batch_size, "max_length": lm.max_length,
            "chat_template": settings.chat_template, "share_prefixes": settings.share_prefixes,
        },
        "data": [name for name, *_ in loaded.data] or "hub",
        "seeds": SEEDS,
        "seconds": round(seconds, 3),
        "resumed": resumed,
        **circumstances(subject),
    }  # fmt: skip
    return result, [_answer(sample) for samples in output["samples"].values() for sample in samples]


def circumstances(subject: Subject) -> dict[str, Any]:
    """Return what every result holds beside its scores: the model, the device, the peak memory, versions and date."""
    device = subject.model.device
    return {
        "model": subject.about(),
        "device": str(device),
        "peak_memory_bytes": peak_memory(device),
        "versions": {**versions(), "lm-eval": metadata.version("lm_eval")},
        "git_commit": git_commit(),
        "date": now(),
    }


def questions_in(loaded: Loaded, limit: int | None) -> int:
    """Questions that will be asked."""
    return sum(min(len(task.eval_docs), limit or sys.maxsize) for task in loaded.content["tasks"].values())


def save(result: dict[str, Any], answers: list[dict[str, Any]], folder: Path, name: str, *, samples: bool) -> Path:
    """Write a result, and with `samples` its answers, into the folder's eval/; an earlier one of that name goes."""
    place = folder / "eval"
    path = place / f"{name}.json"
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        if samples and answers:
            lines = (dumps(answer, default=str) for answer in answers)
            (place / f"{name}.answers.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_json(path, result)
    return path


def name_of(loaded: Loaded, settings: HarnessConfig) -> str:
    """mmlu-5shot-limit100: what has the same name is the same evaluation, of another time."""
    shots = {task.get_config("num_fewshot") for task in loaded.content["tasks"].values()}
    parts = [loaded.name.replace("/", "-")]
    parts += [f"{shots.pop()}shot"] if len(shots) == 1 else []
    parts += ["chat"] if settings.chat_template else []
    parts += [f"limit{settings.limit}"] if settings.limit else []
    return "-".join(parts)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: on the GPU since the evaluation began, otherwise in this process's life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an answer that is kept; the prompt can be made again from the question's number."""
    kept = {key: sample[key] for key in ("doc_id", "filter", "target", "resps", "filtered_resps")}
    return kept | {metric: sample[metric] for metric in sample["metrics"]}


def _answers_folder(subject: Subject, loaded: Loaded, settings: HarnessConfig) -> Path:
    # the same weights behind another tokenizer, or read by another configuration, give other answers
    tokenizer = subject.tokenizer.backend_tokenizer.to_str() if subject.tokenizer.is_fast else repr(subject.tokenizer)
    model = [subject.digest, str(subject.model.dtype), settings.max_length, tokenizer]
    model.append(subject.model.config.to_json_string())
    task = [name_of(loaded, settings), loaded.task, loaded.data, metadata.version("lm_eval")]
    return cache_dir() / "eval-answers" / fingerprint([model, task])


def _prompts_folder(loaded: Loaded) -> Path:
    # lm-eval keeps prompts by task and number of examples; where the examples are from is ours to tell apart
    told = [loaded.data, SEEDS["fewshot"], metadata.version("lm_eval")]
    return cache_dir() / "eval-prompts" / fingerprint(told)
