"""Answers to MT-Bench in FastChat's format, for its judge: `lowrank eval mt-bench --questions question.jsonl`.

The judge is a paid model, so nothing is scored here. The questions have two turns; the temperatures by category and
the length of an answer are those of FastChat's llm_judge (arXiv:2306.05685).
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowrank_cli import console
from lowrank_cli.data import templates
from lowrank_cli.data.conversations import Record, Turn
from lowrank_cli.data.records import read_records, read_whole
from lowrank_cli.data.tokenizer import adds_bos
from lowrank_cli.errors import PreflightError, UsageError
from lowrank_cli.evaluate.progress import Progress
from lowrank_cli.evaluate.subject import Subject

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7


def read_questions(file: str | None, limit: int | None) -> list[dict[str, Any]]:
    """FastChat's questions: `question_id`, `category`, `turns`.

    Raises:
        UsageError: no file is named, or a line is broken; the line is named.
        MissingError: the file is not there.
    """
    if file is None:
        raise UsageError("mt-bench needs its questions", "lowrank eval mt-bench --questions question.jsonl")
    path = Path(file).expanduser()
    questions = []
    for where, question in read_records(path):
        turns = question.get("turns") if isinstance(question, dict) else None
        whole = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not whole or not isinstance(question.get("question_id"), int | str):
            raise UsageError(f"{where}: not a question of MT-Bench", 'a line is {"question_id": 81, "turns": ["..."]}')
        questions.append(question)
    if not questions:
        raise UsageError(f"{path} has no questions", "give FastChat's question.jsonl")
    return questions[:limit]


def write_answers(
    subject: Subject,
    questions: list[dict[str, Any]],
    path: Path,
    *,
    max_new_tokens: int,
    seed: int,
    model_id: str,
    template: str = "auto",
) -> int:
    """Answer the questions that the file has no answer to yet; each is written as soon as it is whole.

    Args:
        subject: the model.
        questions: of `read_questions`.
        path: FastChat's model_answer/MODEL.jsonl.
        max_new_tokens: longest answer.
        seed: of the draws, which are a question's own, whatever comes before it.
        model_id: the model's name in the file.
        template: as in `data.templates`: auto is the tokenizer's chat template, or Alpaca's prompt without one.
    Returns:
        How many answers were written now.
    Raises:
        PreflightError: the model's context has no room for an answer.
        UsageError: no such template.
    """
    chosen = templates.load(template, subject.tokenizer)
    done = _answered(path)
    left = [question for question in questions if question["question_id"] not in done]
    if len(left) < len(questions):
        console.note(f"mt-bench: {len(questions) - len(left)} answers are in {path} already")
    path.parent.mkdir(parents=True, exist_ok=True)
    console.note(f"mt-bench: {len(left)} questions, template {chosen.name}")
    with path.open("a", encoding="utf-8") as file, Progress("mt-bench") as progress:
        progress.begin("questions answered", len(left))
        for question in left:
            turns = list(_turns(subject, chosen, question, max_new_tokens, seed))
            answer = {
                "question_id": question["question_id"],
                "answer_id": uuid.uuid4().hex[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(answer) + "\n")
            file.flush()
            progress.advance()
    return len(left)


def _turns(
    subject: Subject, template: templates.Template, question: dict[str, Any], max_new_tokens: int, seed: int
) -> Iterator[str]:
    temperature = TEMPERATURES.get(str(question.get("category")), OTHER_TEMPERATURE)
    said: list[Turn] = []
    for number, text in enumerate(question["turns"]):
        prompt = _prompt(subject, template, [*said, Turn(text, "", "")])
        # an interrupted file goes on as it would have without the interruption
        torch.manual_seed(zlib.crc32(f"{seed} {question['question_id']} {number}".encode()))
        reply = _reply(subject, prompt, temperature, max_new_tokens)
        said.append(Turn(text, "", reply))
        yield reply


def _prompt(subject: Subject, template: templates.Template, turns: list[Turn]) -> list[int]:
    """The conversation up to where the model answers, as it is in training."""
    tokenizer = subject.tokenizer
    text = template.render(Record("mt-bench", tuple(turns)))
    ids = [tokenizer.bos_token_id] if text.bos and adds_bos(tokenizer) else []
    for part in text.parts[:-1]:
        ids += tokenizer("".join(segment.text for segment in part), add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] if text.eos else []
    # the last segment is the answer, empty still, with what the template puts after it
    last = "".join(segment.text for segment in text.parts[-1][:-1])
    return ids + tokenizer(last, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def _reply(subject: Subject, prompt: list[int], temperature: float, max_new_tokens: int) -> str:
    model, tokenizer = subject.model, subject.tokenizer
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9) - max_new_tokens
    if room < 1:
        raise PreflightError(
            f"the model's context of {room + max_new_tokens} tokens has no room for an answer of {max_new_tokens}",
            "lower --max-new-tokens",
        )
    ids = torch.tensor([prompt[-room:]], device=model.device)
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
        **drawn,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _answered(path: Path) -> set[Any]:
    """Questions that have an answer; what an interruption left half written is cut off."""
    if not path.is_file():
        return set()
    whole, end, half = read_whole(path).rpartition("\n")
    if half:
        path.write_text(whole + end, encoding="utf-8")
    try:
        return {answer["question_id"] for _, answer in read_records(path)}
    except (TypeError, KeyError):
        raise UsageError(f"{path} holds lines that are no answers", "give another folder with --out") from None
