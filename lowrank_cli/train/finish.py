"""The end of a run: the model where Transformers loads it, the numbers, and what to type next."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import torch

from lowrank_cli import console
from lowrank_cli.train import checkpoint
from lowrank_cli.train.metrics import peak_memory

if TYPE_CHECKING:
    from lowrank_cli.train.loop import Session


def finish(session: Session) -> dict[str, Any]:
    """Write model/ and return what came of the run."""
    run, model = session.run, session.model
    for part in session.parts:
        part.merge(model)
    for leftover in run.path.glob(".model.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = run.path / f".model.{os.getpid()}"
    try:
        checkpoint.write_model(temporary, model, session.data.tokenizer)
        shutil.rmtree(run.model, ignore_errors=True)
        checkpoint.commit(temporary, run.model)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    progress = session.progress
    return {
        "method": session.config.method,
        "run": str(run.path),
        "model": str(run.model),
        "plots": session.config.train.plots,
        "steps": progress.step,
        "tokens": progress.tokens,
        **{f"validation_{key}": value for key, value in progress.evaluation.items()},
        "train_seconds": round(progress.seconds, 1),
        "peak_memory_bytes": peak_memory(session.device),
        "optimizer_state_bytes": optimizer_bytes(session.optimizer),
        "sample": sample(session),
    }


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
    console.note(f"\nwrote (after its first words):\n{result['sample']}\n")
    loss, ppl, tokens = (result[f"validation_{key}"] for key in ("loss", "perplexity", "tokens"))
    trained = f"{result['steps']} steps, {console.human_count(result['tokens'])} tokens"
    rows = [
        ["validation perplexity", f"{ppl:.2f} (loss {loss:.4f} over {tokens:,} tokens)"],
        ["trained", f"{trained}, {result['train_seconds']:.0f} s"],
        ["peak memory", console.human_bytes(result["peak_memory_bytes"])],
        ["optimizer state", console.human_bytes(result["optimizer_state_bytes"])],
        ["run", result["run"]],
        *([["pictures", f"{result['run']}/plots"]] if result["plots"] else []),
        ["model", result["model"]],
    ]
    console.table("Done", ["", ""], rows)
    console.note("next:")
    console.note(f"  lowrank pretrain --method {result['method']} --continue-from {result['model']}")
    console.note(
        f"  python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        f"'{result['model']}')('import')[0]['generated_text'])\""
    )
    return f"validation perplexity {ppl:.2f} after {trained}: {result['model']}"
