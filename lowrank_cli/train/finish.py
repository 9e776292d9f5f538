"""The end of a run: the model where Transformers loads it, the numbers, and what to type next."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank_cli import console
from lowrank_cli.errors import LowrankError
from lowrank_cli.models.source import ADAPTER, place
from lowrank_cli.ops.shards import full_numel
from lowrank_cli.train import checkpoint
from lowrank_cli.train.metrics import peak_memory
from lowrank_cli.train.objective import mean_line
from lowrank_cli.train.setup import head_of, head_parameters

if TYPE_CHECKING:
    from lowrank_cli.train.loop import Session


def finish(session: Session) -> dict[str, Any]:
    """Write model/ and return what came of the run."""
    run, progress = session.run, session.progress
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
    reread = merging and task is not None and task.quantize is not None
    for leftover in run.path.glob(".model.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = run.path / f".model.{os.getpid()}"
    try:
        if not merging or reread:
            write_adapter(session, temporary)
        if merging:
            merge(session, temporary)
        shutil.rmtree(run.model, ignore_errors=True)
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
        "base": session.base,
        "labels": getattr(session.model.config, "num_labels", 0),
        "plots": session.config.train.plots,
        "steps": progress.step,
        "tokens": progress.tokens,
        **{f"validation_{key}": value for key, value in progress.evaluation.items()},
        "train_seconds": round(progress.seconds, 1),
        "peak_memory_bytes": peak_memory(session.device),
        **estimated_memory(session),
        "optimizer_state_bytes": optimizer_bytes(session.optimizer),
        "trainable_parameters": trainable,
        "stored_bytes": sum(p.stat().st_size for p in run.model.glob("*.safetensors")),
        "sample": sample(session) if samples(session) else "",
    }


def samples(session: Session) -> bool:
    """Whether the model is where it can write something in a moment: one that was cut over GPUs is on the CPU now."""
    return session.model.can_generate() and session.model.device.type == session.device.type


def estimated_memory(session: Session) -> dict[str, int]:
    """What --dry-run says of this run, beside the measured peak; nothing for a model that cannot be estimated."""
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
    session.data.tokenizer.save_pretrained(folder)


def merge(session: Session, folder: Path) -> None:
    """Turn the model into a plain one and write it; a 4-bit base is read again in full precision first."""
    if (folder / ADAPTER).is_file():
        from lowrank_cli.models import load

        dtype = session.model.dtype if session.model.dtype.is_floating_point else torch.float32
        head = head_of(session.data)
        source = replace(place(session.base, offline=session.config.common.offline), adapter=str(folder))
        session.model = load.load_weights(source, dtype, head=head).to(session.device)
        shutil.rmtree(folder)
    else:
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
    """What the model writes after the first tokens of the validation text; random generators are left as they were."""
    batch = next(iter(session.data.validation()), None)
    positions = getattr(session.model.config, "max_position_embeddings", None) or 1 << 30
    length = min(length, positions - 8)
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
    return f"validation {line.partition(' (')[0]} after {trained}: {result['model']}"


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
    """What a user may want to type now."""
    model = result["model"]
    if result["command"] == "pretrain":
        return [
            f"lowrank pretrain --method {result['method']} --continue-from {model}",
            f"lowrank finetune --model {model}",
            f"lowrank eval mmlu --model {model}",
        ]
    evaluate = f"lowrank eval mmlu --model {model}"
    if "validation_perplexity" not in result:
        auto = "from transformers import AutoModelForSequenceClassification as A"
        load = (
            f"A.from_pretrained('{result['base'] if result['is_adapter'] else model}', num_labels={result['labels']})"
        )
        if result["is_adapter"]:
            auto, load = f"{auto}; from peft import PeftModel as P", f"P.from_pretrained({load}, '{model}')"
        return [f'python -c "{auto}; {load}"']
    if not result["is_adapter"]:
        return [evaluate, f"lowrank compress --model {model}"]
    if result["base"].endswith(".gguf"):
        # PEFT cannot open the base by its name
        return [evaluate]
    return [evaluate, f"python -c \"from peft import AutoPeftModelForCausalLM as A; A.from_pretrained('{model}')\""]
