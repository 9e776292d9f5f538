"""The settings of `lowrank eval`."""

from dataclasses import dataclass

from lowrank_cli.fields import option


@dataclass(frozen=True)
class HarnessConfig:
    """Evaluation"""

    tasks: str | None = option(
        None,
        "mmlu, ppl, mt-bench, boolq, gsm8k ... or any task of lm-eval, joined by commas; with --compare: runs",
    )
    data_dir: str | None = option(None, "folder with the sets as they were published: no network is needed then")
    limit: int | None = option(None, "questions of each task, from the first", min=1)
    num_fewshot: int | None = option(None, "examples in front of each question; the task's own, 5 for mmlu", min=0)
    batch_size: str = option("auto", "requests in one forward pass; auto finds what fits")
    max_length: int | None = option(None, "tokens of context; the model's own unless given", min=2)
    chat_template: bool = option(False, "put the questions in the tokenizer's chat template")
    share_prefixes: bool = option(True, "compute what prompts begin with in common once")
    samples: bool = option(True, "write every answer to eval/NAME.answers.jsonl")
    fresh: bool = option(False, "forget what an interrupted evaluation has left")
    memory_budget: str | None = option(
        None, "such as 24GB: exit code 3 if the weights need more; what is free unless given"
    )
    dataset: str = option("wikitext2", "of ppl: wikitext2, c4, a file or folder as of pretrain, or a hub id")
    text_field: str = option("text", "of ppl: the key or column that holds the text")
    window: int = option(2048, "of ppl: tokens that the model sees at once", min=2)
    stride: int | None = option(
        None, "of ppl: tokens that a window scores; without it windows do not overlap, as in the literature", min=1
    )
    documents: str = option(
        "joined",
        "of ppl: joined: one text, cut into windows; separate: the beginning of each document, as in GaLore's paper",
        choices=("joined", "separate"),
    )
    max_tokens: int | None = option(None, "of ppl: tokens of text to score, such as 500K", min=2, count=True)
    questions: str | None = option(None, "of mt-bench: FastChat's question.jsonl")
    template: str = option("auto", "of mt-bench: auto, chat, alpaca, plain or a .yaml file, as of finetune")
    max_new_tokens: int = option(1024, "of mt-bench: longest answer", min=1)
    compare: bool = option(False, "one table over the runs that are named instead of tasks")
    picture: str | None = option(None, "of --compare: also draw the table into this .png file")
