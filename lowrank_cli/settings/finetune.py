"""The settings of `lowrank finetune` beside those of every training command."""

from dataclasses import dataclass

from lowrank_cli.fields import option


@dataclass(frozen=True)
class TaskConfig:
    """Task"""

    task: str | None = option(
        None,
        "a task by name instead of --dataset: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or svamp, "
        "strategyqa, boolq, commonsense_qa, coin_flip, bigbench_date, object_tracking",
    )
    data_dir: str | None = option(None, "folder with the task's published files; otherwise they come from the hub")
    template: str = option(
        "auto",
        "prompt template: alpaca, plain, qa, chat (the tokenizer's own), or a YAML file of yours; auto is qa for a "
        "task, else chat where the tokenizer has one, else alpaca",
    )
    train_on_inputs: bool = option(False, "loss on the prompt too, not on the response only")
    skip_bad: bool = option(
        False,
        "leave out and count the records that cannot be learned from, such as empty ones, instead of stopping at the "
        "first",
    )
    validation_share: float = option(
        0.05, "share of the records held out where the data has no validation part", above=0, below=1
    )
    group_by_length: bool = option(False, "batches of records of like length: less padding, another order")
    keep_best: bool = option(True, "write the best evaluation's weights to model/, not the last ones")
    patience: int | None = option(None, "stop after this many evaluations without a better one", min=1)
    quantize: str | None = option(
        None, "keep the frozen base in 4 bits through bitsandbytes; adapter methods only", choices=("nf4", "fp4")
    )
    merge: bool = option(False, "write a plain model with the adapter merged into it, not the adapter")
