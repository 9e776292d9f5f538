"""The processes of the end-to-end bench; each prints one JSON line: `trainers.py prepare|lowrank|huggingface PROBLEM`.

`prepare` writes what both sides start from: initial weights and token blocks, in lowrank's own order. The other two
train. Both are measured with the same hooks of torch: memory before the first forward pass and at the end of the last
optimizer step, and a clock at the end of every step. What a side does after its last update (saving, plots, a sample)
counts for neither.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowrank_cli.run import peak_resident_bytes

SWITCHES = ("--offline", "--quiet", "--no-plots")


class Meter:
    """The clock and the memory of a training run, the same for both sides."""

    def __init__(self, problem: dict):
        self.problem = problem
        self.start_bytes = 0
        self.ends: list[float] = []
        self.peak_bytes = 0
        register_optimizer_step_post_hook(self.after_step)
        self.first_forward = register_module_forward_pre_hook(self.before_forward)

    def before_forward(self, *_) -> None:
        """Libraries, data and weights are there: what is held from here on is training's."""
        self.start_bytes = psutil.Process().memory_info().rss
        self.first_forward.remove()

    def after_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """An optimizer step has ended; those without numbers are of the estimate that a run ends with."""
        if optimizer.param_groups[0]["params"][0].device.type == "meta":
            return
        self.ends.append(time.perf_counter())
        self.peak_bytes = peak_resident_bytes()

    def result(self, **extra: float) -> dict:
        """What the run came to; raises RuntimeError if the number of steps is not the wanted one."""
        warmup, timed = self.problem["warmup"], self.problem["timed"]
        if len(self.ends) != warmup + timed or not self.start_bytes:
            raise RuntimeError(f"{len(self.ends)} optimizer steps were seen, {warmup + timed} were wanted")
        tokens = timed * self.problem["batch_size"] * self.problem["max_length"]
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / (self.ends[-1] - self.ends[warmup - 1]),
            "peak_bytes": self.peak_bytes,
            "training_bytes": self.peak_bytes - self.start_bytes,
            **extra,
        }


def flags(problem: dict) -> list[str]:
    """The part of the `lowrank pretrain` command line that does not depend on the method."""
    steps = problem["warmup"] + problem["timed"]
    values = {
        "model": problem["model"],
        "batch-size": problem["batch_size"],
        "max-length": problem["max_length"],
        "vocab-size": problem["vocab_size"],
        "max-steps": steps,
        "scheduler": "cosine",
        "warmup-steps": steps // 10,
        "min-lr-ratio": problem["min_lr_ratio"],
        "grad-clipping": 0,
        "weight-decay": 0,
        "dtype": "float32",
        "device": "cpu",
        # windows that begin and end where the timed part does
        "log-every": problem["warmup"],
        "eval-every": steps,
        "save-every": steps,
        "eval-tokens": problem["max_length"],
        "seed": 0,
    }
    if problem["smoke"]:
        values["dataset"] = f"{problem['folder']}/text.jsonl"
    return ["pretrain", *SWITCHES, *(str(x) for k, v in values.items() for x in (f"--{k}", v))]


def beginning(problem: dict) -> tuple[Any, Any, Any]:
    """The configuration, the data and the architecture of `lowrank pretrain`; fills lowrank's cache on the way."""
    from lowrank_cli import config, data
    from lowrank_cli.models import load as models

    if problem["smoke"]:
        # forty documents that every Python has
        source = inspect.getsource(inspect) + inspect.getsource(json)
        parts = [source[i : i + 2000] for i in range(0, 80_000, 2000)]
        lines = "".join(json.dumps({"text": part}) + "\n" for part in parts)
        (Path(problem["folder"]) / "text.jsonl").write_text(lines)
    given = [flag for flag in flags(problem)[1:] if flag not in SWITCHES]
    values = {key[2:].replace("-", "_"): value for key, value in zip(given[::2], given[1::2], strict=True)}
    run = config.resolve("pretrain", values, {})
    batches = data.build(
        run.data,
        batch_size=run.train.batch_size,
        total_batch_size=run.train.batch_size,
        eval_tokens=run.eval.eval_tokens,
        seed=run.common.seed,
        offline=True,
    )
    tokens = batches.tokenizer
    architecture = models.build_config(
        run.model,
        vocab_size=len(tokens),
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        max_length=run.data.max_length,
    )
    return run, batches, architecture


def prepare(problem: dict) -> dict:
    """The initial model and the blocks of every step, for the Trainer; fills lowrank's cache on the way."""
    from lowrank_cli.models import load as models

    folder, steps = Path(problem["folder"]), problem["warmup"] + problem["timed"]
    run, batches, architecture = beginning(problem)
    blocks = [b["input_ids"] for _ in range(steps) for b in batches.train.next_update()]  # each (B, T)
    torch.save(torch.cat(blocks), folder / "blocks.pt")
    options = {"dtype": torch.float32, "device": "cpu", "seed": run.common.seed, "offline": True}
    models.load(run.model, config=architecture, **options).save_pretrained(folder / "initial")
    return {}


def lowrank(problem: dict) -> dict:
    """`lowrank pretrain`, through the command line's own entry."""
    from lowrank_cli.main import main

    meter = Meter(problem)
    method = ["--method", problem["method"], "--lr", str(problem["lr"])]
    if problem["method"] == "galore":
        for key in ("rank", "update_proj_gap", "scale"):
            method += [f"--galore-{key.replace('_', '-')}", str(problem[key])]
    if problem.get("per_layer"):
        method.append("--per-layer")
    method += problem.get("flags", [])
    with tempfile.TemporaryDirectory(dir=problem["folder"]) as out:
        code = main([*flags(problem), *method, "--out", out])
        if code:
            raise RuntimeError(f"lowrank pretrain ended with exit code {code}")
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    windows = [line for line in lines if "tokens_per_second" in line]
    seconds = tokens = 0.0
    for before, line in pairwise(windows):
        if line["step"] > problem["warmup"]:
            tokens += line["tokens"] - before["tokens"]
            seconds += (line["tokens"] - before["tokens"]) / line["tokens_per_second"]
    result = meter.result(first_loss=windows[0]["loss"], reported_tokens_per_s=tokens / seconds)
    if tokens != result["tokens"]:
        raise RuntimeError(f"metrics.jsonl counts {tokens:.0f} tokens in the timed part, not {result['tokens']}")
    return result


def huggingface(problem: dict) -> dict:
    """The Trainer, with nothing in its way: no evaluation, saving, clipping, progress bar or worker."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    meter, folder = Meter(problem), Path(problem["folder"])
    steps = problem["warmup"] + problem["timed"]
    examples = [{"input_ids": row, "labels": row} for row in torch.load(folder / "blocks.pt")]
    projected = {}
    if problem["optim"].startswith("galore"):
        projected = {
            "optim_target_modules": ["attn", "mlp"],
            "optim_args": ", ".join(f"{key}={problem[key]}" for key in ("rank", "update_proj_gap", "scale")),
        }
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32, use_cache=False),
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            optim=problem["optim"],
            learning_rate=problem["lr"],
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": problem["min_lr_ratio"]},
            warmup_steps=steps // 10,
            max_steps=steps,
            per_device_train_batch_size=problem["batch_size"],
            train_sampling_strategy="sequential",
            weight_decay=0.0,
            max_grad_norm=0.0,
            bf16=False,
            fp16=False,
            use_cpu=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            logging_first_step=True,
            logging_steps=steps,
            disable_tqdm=True,
            seed=0,
            **projected,
        ),
        train_dataset=examples,
        data_collator=default_data_collator,
    )
    trainer.train()
    return meter.result(first_loss=float(trainer.state.log_history[0]["loss"]))


if __name__ == "__main__":
    role = {"prepare": prepare, "lowrank": lowrank, "huggingface": huggingface}[sys.argv[1]]
    print(json.dumps(role(json.loads(sys.argv[2]))))
