"""`lowrank pretrain` against the Hugging Face Trainer: the same model, tokens and schedule; speed and peak memory.

Every measurement is a fresh process (`trainers.py`), ours and the Trainer's in turn. GaLore is compared with
optim="galore_adamw", full-rank AdamW with optim="adamw_torch_fused". Peak memory is given whole, and without what the
process held before its first forward pass: libraries, data, weights. Both sides refresh a basis in the first update
only, so the timed updates have no decomposition in them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from comparison import Bar, Comparison, Settings, answer, console, in_alternation, in_process

TRAINERS = Path(__file__).with_name("trainers.py")
PEERS = {"galore": "galore_adamw", "full": "adamw_torch_fused"}
WARMUP_STEPS = 5
TIMED_STEPS = 40
MIB = 2**20


def problem(settings: Settings, folder: str) -> dict:
    """What both sides train, as JSON."""
    smoke = settings.smoke
    timed = settings.steps or (4 if smoke else TIMED_STEPS)
    return {
        "folder": folder,
        "model": "llama-9m",
        "batch_size": 2 if smoke else 16,
        "max_length": 32 if smoke else 256,
        "vocab_size": 512 if smoke else 4096,
        "warmup": 1 if smoke else WARMUP_STEPS,
        "timed": timed,
        "smoke": smoke,
        "rank": 32,
        "update_proj_gap": 200,
        "scale": 0.25,
        "min_lr_ratio": 0.1,
    }


def compare(settings: Settings) -> list[Comparison]:
    """Speed and memory for each method."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="lowrank-bench-") as folder:
        common = problem(settings, folder)
        # a smoke run trains its tokenizer on a page of text and must not fill the user's cache with it
        environment = {"LOWRANK_CACHE": f"{folder}/cache"} if settings.smoke else {}

        def call(role: str, **extra) -> dict:
            arguments = json.dumps({**common, **extra})
            return in_process(TRAINERS, role, arguments, threads=settings.threads, environment=environment)

        call("prepare")
        for method, optim in PEERS.items():
            lr = 0.01 if method == "galore" else 0.001
            console.print(f"end_to_end: {settings.repeats} x lowrank {method}, Trainer {optim}")
            results = in_alternation(
                {
                    "ours": lambda method=method, lr=lr: call("lowrank", method=method, lr=lr),
                    "peer": lambda optim=optim, lr=lr: call("huggingface", optim=optim, lr=lr),
                },
                settings.repeats,
            )
            rows += rows_of(f"{method}, Trainer {optim}", results)
    return rows


def rows_of(what: str, results: dict[str, list[dict]]) -> list[Comparison]:
    """The comparisons of one method; raises RuntimeError if the two sides did not train the same thing."""
    for ours, peer in zip(results["ours"], results["peer"], strict=True):
        if ours["tokens"] != peer["tokens"] or abs(ours["first_loss"] - peer["first_loss"]) > 2e-3:
            raise RuntimeError(f"{what}: the two sides differ: ours {ours}, peer {peer}")
    reported = [r["reported_tokens_per_s"] / r["tokens_per_s"] for r in results["ours"]]
    console.print(f"end_to_end: metrics.jsonl reports {min(reported):.3f}..{max(reported):.3f} of the measured speed")

    def row(label: str, unit: str, key: str, factor: float, bar: Bar | None) -> Comparison:
        sides = {name: [r[key] / factor for r in runs] for name, runs in results.items()}
        return Comparison("end_to_end", f"{label}: {what}", unit, sides["ours"], sides["peer"], bar)

    return [
        row("speed", "tok/s", "tokens_per_s", 1, Bar(1.0)),
        row("peak memory", "MiB", "peak_bytes", MIB, Bar(1.0, at_most=True)),
        row("peak over that before training", "MiB", "training_bytes", MIB, Bar(1.0, at_most=True)),
    ]


if __name__ == "__main__":
    answer(compare)
