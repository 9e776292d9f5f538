"""`lowrank pretrain` against the Hugging Face Trainer: the same model, tokens and schedule; speed and peak memory.

Every measurement is a fresh process (`trainers.py`), ours and the Trainer's in turn. GaLore is compared with
optim="galore_adamw", full-rank AdamW with optim="adamw_torch_fused". Peak memory is given whole, and without what the
process held before its first forward pass: libraries, data, weights. Both sides refresh a basis in the first update
only, so the timed updates have no decomposition in them.

Then `lowrank pretrain --method galore` on llama-60m against `--method full`, both ours: what projection inside
backward, galore's default here, gives a model whose layers weigh more than its head. The first update, a warm-up,
refreshes every basis and so makes every full gradient: peak memory shows what that costs, with `--per-layer` and
without.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from comparison import Bar, Comparison, Settings, answer, console, in_alternation, in_process

TRAINERS = Path(__file__).with_name("trainers.py")
PEERS = {"galore": "galore_adamw", "full": "adamw_torch_fused"}
WARMUP_STEPS = 5
TIMED_STEPS = 40
MIB = 2**20
# what is compared: key of a result, unit, and what a unit is
QUANTITIES = {
    "speed": ("tokens_per_s", "tok/s", 1),
    "peak memory": ("peak_bytes", "MiB", MIB),
    "peak over that before training": ("training_bytes", "MiB", MIB),
}
# GaLore's Table 2
RANK_60M = 128
# an update of it takes seconds
PAIRS_60M = 3


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
        for method, optim in list(PEERS.items())[: 1 if settings.smoke else None]:
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
        rows += ours_against_ours(settings, call)
    return rows


def ours_against_ours(settings: Settings, call: Callable[..., dict]) -> list[Comparison]:
    """llama-60m, in at most `PAIRS_60M` pairs: galore against full, and once per layer against plain."""
    smoke, pairs = settings.smoke, min(settings.repeats, PAIRS_60M)
    size = {
        "model": "llama-9m" if smoke else "llama-60m",
        "batch_size": 2 if smoke else 8,
        "warmup": 1 if smoke else 2,
        "timed": settings.steps or (1 if smoke else 6),
        "rank": 32 if smoke else RANK_60M,
    }
    galore = {**size, "method": "galore", "lr": 0.01}
    console.print(f"end_to_end: {pairs} x lowrank galore, full, and once galore --per-layer: {size['model']}")
    results = in_alternation(
        {
            "ours": lambda: call("lowrank", **galore),
            "peer": lambda: call("lowrank", **size, method="full", lr=0.001),
        },
        pairs,
    )
    name = f"{size['model']}, galore rank {size['rank']}"
    what = f"{name} in backward (no refresh in the timed updates), full"
    check(what, results)
    memory = list(QUANTITIES)[1:]
    # a peak shows in one update after the refresh
    per_layer = {"ours": [call("lowrank", **galore | {"timed": 1}, per_layer=True)], "peer": results["ours"][:1]}
    return [
        row(what, results, "speed", Bar(1.05)),
        *(row(what, results, label) for label in memory),
        *(row(f"{name} --per-layer, without it", per_layer, label) for label in memory),
    ]


def rows_of(what: str, results: dict[str, list[dict]]) -> list[Comparison]:
    """The comparisons with a Trainer."""
    check(what, results)
    return [
        row(what, results, "speed", Bar(1.0)),
        row(what, results, "peak memory", Bar(1.0, at_most=True)),
        row(what, results, "peak over that before training", Bar(1.0, at_most=True)),
    ]


def check(what: str, results: dict[str, list[dict]]) -> None:
    """Raises RuntimeError if the two sides did not train the same thing."""
    for ours, peer in zip(results["ours"], results["peer"], strict=True):
        if ours["tokens"] != peer["tokens"] or abs(ours["first_loss"] - peer["first_loss"]) > 2e-3:
            raise RuntimeError(f"{what}: the two sides differ: ours {ours}, peer {peer}")
    reported = [r["reported_tokens_per_s"] / r["tokens_per_s"] for r in results["ours"]]
    console.print(f"end_to_end: metrics.jsonl reports {min(reported):.3f}..{max(reported):.3f} of the measured speed")


def row(what: str, results: dict[str, list[dict]], label: str, bar: Bar | None = None) -> Comparison:
    """One quantity of both sides."""
    key, unit, factor = QUANTITIES[label]
    ours, peer = ([run[key] / factor for run in results[side]] for side in ("ours", "peer"))
    return Comparison("end_to_end", f"{label}: {what}", unit, ours, peer, bar)


if __name__ == "__main__":
    answer(compare)
