"""The end of a run: the model where Transformers loads it, the numbers, and what to type next."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lowrank_cli import console
from lowrank_cli.errors import LowrankError
from lowrank_cli.misfortune import reason
from lowrank_cli.models.architecture import positions
from lowrank_cli.models.source import place
from lowrank_cli.models.tying import apart
from lowrank_cli.parallel.shards import full_numel
from lowrank_cli.train import checkpoint
from lowrank_cli.train.metrics import peak_memory
from lowrank_cli.train.objective import is_better, mean_line
from lowrank_cli.train.setup import head_of, head_parameters

if TYPE_CHECKING:
    from lowrank_cli.train.loop import Session


# what the last lines on the screen are made of
SHOWN = {
    **dict.fromkeys(("command", "method", "device", "run", "model", "base", "sample", "task", "data_dir"), str),
    **dict.fromkeys(("is_adapter", "plots"), bool),
    **dict.fromkeys(("steps", "tokens", "peak_memory_bytes", "optimizer_state_bytes", "stored_bytes"), int),
    **dict.fromkeys(("trainable_parameters",), int),
    **dict.fromkeys(("train_seconds", "validation_loss"), (int, float)),
}


def finish(session: Session) -> dict[str, Any]:
    """Write model/ and return what came of the run."""
    run, progress = session.run, session.progress
    judge(session)
    kept = checkpoint.best_step(run.path / "best") if progress.best else None
    if kept is not None and kept != progress.best["step"]:
        console.warn(
            f"best/ has the weights of step {kept}, which this run did not judge best: the last ones are taken"
        )
    elif kept is not None:
        if progress.best["step"] != progress.step:
            console.note(f"model/ gets the best weights, of step {int(progress.best['step'])}")
        session.load_method_states(checkpoint.load_best(run.path / "best", session.model))
        progress.evaluation = {k: v for k, v in progress.best.items() if k != "step"}
    task = session.config.task
    merging = session.adapter is None or task.merge
    for leftover in run.path.glob(".model.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = run.path / f".model.{os.getpid()}"
    try:
        if session.adapter is not None:
            # on disk before a merge is tried, which may fail
            write_adapter(session, temporary)
            checkpoint.commit(temporary, run.model)
        if merging:
            with keeping_adapter(session):
                merge(session, temporary, run.model)
                checkpoint.commit(temporary, run.model)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    trainable = sum(full_numel(p) for group in session.optimizer.param_groups for p in group["params"])
    return {
        "command": session.config.command,
        "method": session.config.method,
        "device": session.device.type,
        "run": str(run.path),
        "model": str(run.model),
        "is_adapter": not merging,
        "is_compressed": getattr(session.model.config, "quantization_config", None) is not None,
        "base": session.base,
        "task": (task.task if task is not None else None) or "",
        "data_dir": (task.data_dir if task is not None else None) or "",
        "plots": session.config.train.plots,
        "steps": progress.step,
        "tokens": progress.tokens,
        **{f"validation_{key}": value for key, value in progress.evaluation.items()},
        "best_step": int(progress.best["step"]) if kept is not None else None,
        "train_seconds": round(progress.seconds, 1),
        "peak_memory_bytes": peak_memory(session.device),
        **estimated_memory(session),
        "optimizer_state_bytes": optimizer_bytes(session.optimizer),
        "trainable_parameters": trainable,
        "stored_bytes": sum(p.stat().st_size for p in run.model.glob("*.safetensors")),
        "sample": sample(session) if samples(session) else "",
    }


def samples(session: Session) -> bool:
    """Return whether the model can write a sample in a moment: one that was sharded over GPUs is on the CPU now."""
    return session.model.can_generate() and session.model.device.type == session.device.type


def estimated_memory(session: Session) -> dict[str, int]:
    """Return the estimate of --dry-run for this run, in bytes; {} for a model that cannot be estimated."""
    from lowrank_cli.train import dry

    config = session.config
    try:
        found = dry.Description(config, dry.architecture(config, len(session.data.tokenizer))).estimate()
    except LowrankError as error:
        console.warn(error.message)
        return {}
    return {"estimated_memory_bytes": found.total}


def write_adapter(session: Session, folder: Path) -> None:
    """The adapter, with the head that was trained with it, and the tokenizer."""
    folder.mkdir(parents=True)
    base = session.base
    session.adapter.save_adapter(session.model, folder, str(Path(base).resolve()) if Path(base).exists() else base)
    head = head_parameters(session.model)
    if head:
        from lowrank_cli.models import adapters

        inner = session.model.base_model_prefix + "."
        modules = sorted({name.removeprefix(inner).partition(".")[0] for name in head})
        adapters.add_head(folder, head, modules, "SEQ_CLS")
        # what the base does not know: its labels, and the padding token of its batches
        session.model.config.save_pretrained(folder)
    session.data.tokenizer.save_pretrained(folder)


def judge(session: Session) -> None:
    """Look at what would be handed back: the best weights of a task, else the last ones.

    Raises:
        LowrankError: training diverged: they are worse by two nats than before the first update.
    """
    progress, metric = session.progress, session.objective.best
    start, end = progress.start, {k: v for k, v in (progress.best or progress.evaluation).items() if k != "step"}
    if not start or not end or not progress.step:
        return
    # e^2 times the perplexity, or the odds of a class; a squared error has no unit, so it is e^2 times that
    bound = start["loss"] + 2 if session.objective.in_nats else math.e**2 * start["loss"]
    if not end["loss"] <= bound:
        raise LowrankError(
            f"training diverged: {mean_line(start)} before the first update, {mean_line(end)} at its best after it; "
            "model/ is not written",
            f"start again with a lower --lr than {session.config.optim.lr:g}, --grad-clipping 1.0 or a longer "
            "--warmup-steps",
        )
    if session.config.task is not None and not is_better(end, start, *metric):
        console.warn(f"training did not improve on its start: {mean_line(start)} there, {mean_line(end)} now")


@contextmanager
def keeping_adapter(session: Session) -> Iterator[None]:
    """Say where what was trained is if its merge fails."""
    try:
        yield
    except (OSError, LowrankError, RuntimeError, SafetensorError) as error:
        if session.adapter is None:
            raise
        raise LowrankError(
            f"the adapter is whole, but merging it failed: {reason(error)}",
            f"the adapter is in {session.run.model}; make room and resume the run to merge it: "
            f"--resume {session.run.path}",
        ) from error


def merge(session: Session, folder: Path, adapter: Path) -> None:
    """Turn the model into a plain one and write it; a 4-bit base is read again in full precision first.

    Args:
        session: of the run.
        folder: to be made.
        adapter: where the adapter was saved.
    """
    task = session.config.task
    if session.adapter is not None and task.quantize is not None:
        from lowrank_cli.models import load

        dtype = session.model.dtype if session.model.dtype.is_floating_point else torch.float32
        head = head_of(session.data)
        source = replace(place(session.base, offline=session.config.common.offline), adapter=str(adapter))
        session.model = load.load_weights(source, dtype, head=head).to(session.device)
    else:
        with apart(session.model):
            for part in session.parts:
                part.merge(session.model)
    checkpoint.write_model(folder, session.model, session.data.tokenizer)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of storage that the optimizer's state holds alive, each storage once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


@torch.no_grad()
def sample(session: Session, length: int = 48) -> str:
    """Return the first validation tokens and what the model writes after them; random generators keep their state."""
    batch = next(iter(session.data.validation()), None)
    length = min(length, (positions(session.model.config) or 1 << 30) - 8)
    if batch is None or batch["input_ids"].shape[1] < 8 or length < 1:
        return ""
    prompt = batch["input_ids"][:1, :8].to(session.device)
    session.model.eval()
    with torch.random.fork_rng(devices=[session.device] if session.device.type == "cuda" else []):
        torch.manual_seed(0)
        tokens = session.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            use_cache=True,
            pad_token_id=session.data.tokenizer.pad_token_id,
        )
    return session.data.tokenizer.decode(tokens[0], skip_special_tokens=True)


def summary(result: dict[str, Any]) -> str:
    """The last lines on the screen; returns the one for stdout."""
    if result["sample"]:
        console.note(f"\nwrote (after its first words):\n{result['sample']}\n")
    values = {k.removeprefix("validation_"): v for k, v in result.items() if k.startswith("validation_")}
    trained = f"{result['steps']} steps, {console.human_count(result['tokens'])} tokens"
    line = mean_line(values)
    stored = f"{console.human_bytes(result['stored_bytes'])}: {result['model']}"
    rows = [
        ["validation", line],
        ["trained", f"{trained}, {result['train_seconds']:.0f} s"],
        ["trained parameters", f"{result['trainable_parameters']:,}"],
        ["peak memory", memory_line(result)],
        ["optimizer state", console.human_bytes(result["optimizer_state_bytes"])],
        ["run", result["run"]],
        *([["pictures", f"{result['run']}/plots"]] if result["plots"] else []),
        ["adapter" if result["is_adapter"] else "model", stored],
    ]
    console.table("Done", ["", ""], rows)
    if commands := next_commands(result):
        console.note("next:")
    for command in commands:
        console.note(f"  {command}")
    best = f", the best of step {result['best_step']}" if result.get("best_step") is not None else ""
    return f"validation {line.partition(' (')[0]} after {trained}{best}: {result['model']}"


def memory_line(result: dict[str, Any]) -> str:
    """The measured peak and the estimated one. On a CPU the first is of the whole process, Python and all."""
    measured = console.human_bytes(result["peak_memory_bytes"])
    if "estimated_memory_bytes" not in result:
        return measured
    estimated = console.human_bytes(result["estimated_memory_bytes"])
    if result["device"] == "cpu":
        return f"{measured} of the process; {estimated} estimated for its tensors"
    return f"{measured}; {estimated} estimated"


def next_commands(result: dict[str, Any]) -> list[str]:
    """Return the commands that a user may want to type now."""
    model = result["model"]
    typed = shlex.quote(model)
    if result["command"] == "pretrain":
        return [
            f"lowrank pretrain --method {result['method']} --continue-from {typed}",
            f"lowrank finetune --model {typed}",
            f"lowrank eval mmlu --model {typed}",
        ]
    evaluate = f"lowrank eval mmlu --model {typed}"
    if "validation_perplexity" not in result:
        data = f" --data-dir {shlex.quote(result['data_dir'])}" if result["data_dir"] else ""
        return [f"lowrank eval {result['task']} --model {typed}{data}"]
    if not result["is_adapter"]:
        return [evaluate, *([] if result.get("is_compressed") else [f"lowrank compress --model {typed}"])]
    if result["base"].endswith(".gguf"):
        # PEFT cannot open the base by its name
        return [evaluate]
    load = f"from peft import AutoPeftModelForCausalLM as A; print(A.from_pretrained({model!r}))"
    return [evaluate, f"python -c {shlex.quote(load)}"]
