"""The settings of the commands that train."""

from dataclasses import dataclass

from lowrank_cli.fields import option


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    name: str | None = option(
        None,
        "preset (llama-9m ... llama-7b), local Hugging Face folder, run folder or hub id; pretrain takes llama-9m",
        flag="model",
    )
    model_config: str | None = option(None, "JSON file with a model configuration; GaLore's own files are understood")
    continue_from: str | None = option(None, "start from these weights: Hugging Face folder, run folder or hub id")
    dtype: str = option(
        "auto",
        "of the weights; auto is bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    allow_partial: bool = option(False, "train also where the method reaches less than half of the layers' parameters")
    activation_checkpointing: bool = option(False, "recompute activations in backward: less memory, a third slower")


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    dataset: str = option(
        "stdlib", "stdlib, a .txt .json .jsonl .json.gz .csv .parquet file, a folder of them, or a hub id (streamed)"
    )
    dataset_config: str | None = option(None, "configuration of a hub dataset, such as en")
    validation_dataset: str | None = option(
        None, "validation text, as --dataset; otherwise the dataset's own validation part, or every 20th document"
    )
    text_field: str = option("text", "the key or column that holds the text")
    streaming: bool = option(
        False,
        "read local files as a stream instead of tokenizing them whole into the cache; hub datasets always stream",
    )
    tokenizer: str | None = option(
        None,
        "local folder or file, or hub id; otherwise the model's own, or a byte-level "
        "BPE trained on the dataset once and cached",
    )
    vocab_size: int = option(4096, "entries of a tokenizer trained here", min=257)
    max_length: int = option(256, "tokens in a sequence", min=2)
    packing: str = option(
        "packed",
        "packed: documents joined and cut into full blocks; padded: one document a row, "
        "truncated and padded, as in the papers",
        choices=("packed", "padded"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    optimizer: str = option(
        "adamw", "the update rule; adamw8bit has 8-bit moments", choices=("adamw", "adamw8bit", "adafactor")
    )
    per_layer: bool = option(False, "update each tensor within backward and free its gradient at once")
    kernel: str = option(
        "auto",
        "what the projected update runs on; torch is plain PyTorch, auto the fastest that is at hand",
        choices=("auto", "cuda", "cpu", "torch"),
    )
    stochastic_rounding: bool = option(False, "round bfloat16 weights up or down at random, so that no update is lost")
    lr: float = option(1e-3, "peak learning rate", above=0, max=10)
    lr_other: float | None = option(
        None, "peak of what is outside the layers' linears: embedding, head, norms; --lr unless given", above=0, max=10
    )
    beta1: float = option(0.9, "decay of the first moment", min=0, below=1)
    beta2: float = option(0.999, "decay of the second moment", min=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", min=0)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", min=0)
    grad_clipping: float = option(
        0.0, "largest global gradient norm; 0 is off, and with --per-layer it is off unless given", min=0
    )
    scheduler: str = option(
        "cosine",
        "learning-rate schedule after the warm-up",
        choices=("linear", "cosine", "cosine_restarts", "constant"),
    )
    warmup_steps: int | None = option(None, "linear warm-up; a tenth of the run unless given", min=0)
    min_lr_ratio: float = option(0.1, "final learning rate as a share of the peak", min=0, max=1)
    num_cycles: int = option(4, "cycles of cosine_restarts", min=1)


@dataclass(frozen=True)
class TrainConfig:
    """Training"""

    max_steps: int | None = option(None, "optimizer updates", min=1)
    max_train_tokens: int | None = option(None, "stop after this many tokens, such as 100M", min=1, count=True)
    epochs: float | None = option(None, "passes over the dataset", above=0)
    batch_size: int = option(16, "sequences in one forward pass on one device", min=1)
    total_batch_size: int | None = option(
        None, "sequences in one update on all devices; more than a batch accumulates gradients", min=1
    )
    nproc: int = option(1, "processes on this machine, one for each GPU; several machines take torchrun", min=1)
    parallel: str = option(
        "ddp", "what several processes hold: ddp, each the whole model; fsdp, each its share", choices=("ddp", "fsdp")
    )
    rank_timeout: int = option(
        1800, "seconds after which a process that does not answer the others ends the run", min=1
    )
    log_every: int = option(10, "updates between metric lines", min=1)
    save_every: int | None = option(None, "updates between checkpoints; a quarter of the run unless given", min=1)
    keep: int = option(2, "newest checkpoints to keep", min=1)
    plots: bool = option(True, "draw plots/*.png with every checkpoint and at the end")
    log: str = option("", "also log to: tensorboard, wandb, trackio; comma-separated")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    eval_every: int | None = option(None, "updates between evaluations; a tenth of the run unless given", min=1)
    eval_tokens: int = option(50_000, "validation tokens, such as 10M", min=1, count=True)
