"""`lowrank eval mmlu` against lm-eval by hand: the same model, files, prompts and scores, each in its own process.

The model has random weights and the questions are random words: in MMLU's published layout, five examples a subject.
The peer is what its users write: `simple_evaluate` with `HFLM(pretrained=FOLDER)`, on YAML of the same files.

    python evaluation.py ours|peer FOLDER LIMIT     one side; prints what it measured as JSON
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from comparison import Bar, Comparison, Settings, answer, console, in_alternation, in_process

WORDS = 400
BATCH_SIZE = 8


def compare(settings: Settings) -> list[Comparison]:
    """The comparisons: time of the process, time of the requests in it."""
    limit = settings.steps or (1 if settings.smoke else 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, small=settings.smoke)
        console.print(f"evaluation: {settings.repeats} x MMLU with {limit} questions a subject")

        def side(which: str) -> dict:
            start = time.perf_counter()
            environment = {"LOWRANK_CACHE": str(folder / "cache")}
            found = in_process(
                Path(__file__), which, str(folder), str(limit), threads=settings.threads, environment=environment
            )
            return {**found, "process_s": time.perf_counter() - start}

        # lm-eval's names are read once for each version, and kept
        side("ours")
        found = in_alternation({"ours": lambda: side("ours"), "peer": lambda: side("peer")}, settings.repeats)
    scores = {round(run["acc"], 9) for runs in found.values() for run in runs}
    if len(scores) != 1:
        raise RuntimeError(f"the two sides have other scores: {scores}")

    def row(key: str, what: str) -> Comparison:
        values = [[run[key] for run in found[which]] for which in ("ours", "peer")]
        return Comparison("evaluation", what, "s", *values, Bar(1.0, at_most=True))

    return [row("process_s", "time, lm-eval: mmlu, whole process"), row("requests_s", "time, lm-eval: mmlu, requests")]


def make(folder: Path, *, small: bool) -> None:
    """A model with its tokenizer in folder/model, and MMLU's files in folder/data."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lowrank_cli.evaluate.local_tasks import subjects

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(WORDS)]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    for part, count in (("dev", 5), ("test", 100)):
        (folder / "data" / part).mkdir(parents=True)
        for subject in subjects():
            with (folder / "data" / part / f"{subject}_{part}.csv").open("w", encoding="utf-8", newline="") as file:
                rows = ([text(30), *(text(4) for _ in range(4)), draw.choice("ABCD")] for _ in range(count))
                csv.writer(file).writerows(rows)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text(20_000)], vocab_size=2000, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    width = 32 if small else 256
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2 if small else 6, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def ours(folder: Path, limit: int) -> dict:
    """The command's own way."""
    from lowrank_cli import config
    from lowrank_cli.evaluate import session
    from lowrank_cli.evaluate.lm import EvaluatedLM

    spent = timed(EvaluatedLM)
    given = {"tasks": "mmlu", "data_dir": str(folder / "data"), "model": str(folder / "model"), "limit": limit}
    resolved = config.resolve("eval", {**given, "device": "cpu", "batch_size": str(BATCH_SIZE)}, {})
    [(result, _)] = session.run(resolved, str(folder / "out"))
    return {"acc": next(row["value"] for row in result["rows"] if row["level"] == 0), "requests_s": sum(spent)}


def peer(folder: Path, limit: int) -> dict:
    """lm-eval as its documentation says."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lowrank_cli.evaluate import local_tasks

    written, _ = local_tasks.write(["mmlu"], folder / "data")
    spent = timed(HFLM)
    model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=BATCH_SIZE)
    manager = TaskManager(include_path=str(written))
    output = simple_evaluate(model=model, tasks=["mmlu"], task_manager=manager, num_fewshot=5, limit=limit)
    return {"acc": output["results"]["mmlu"]["acc,none"], "requests_s": sum(spent)}


def timed(cls: type) -> list[float]:
    """Seconds of each call of the class's `loglikelihood`, tokenizing and scoring, filled as they are made."""
    seconds: list[float] = []
    original = cls.loglikelihood

    def call(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    cls.loglikelihood = call
    return seconds


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps({"ours": ours, "peer": peer}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        answer(compare)
