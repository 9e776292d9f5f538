"""A hundred updates and the look at every number before the checkpoint after them, against the updates alone: time.

A LLaMA of 60M with GaLore at rank 128, one thread, made tokens. The look is what `lowrank` does before every save:
weights, moments, bases and gradients are searched for values that are not finite.
"""

from __future__ import annotations

import time

import torch
from comparison import Bar, Comparison, Settings, answer, console

from lowrank_cli import GaLoreAdamW
from lowrank_cli.models import load as models
from lowrank_cli.models.forward import causal_lm_loss
from lowrank_cli.parallel.replicas import Alone
from lowrank_cli.settings.training import ModelConfig
from lowrank_cli.train.audit import first_broken

UPDATES, CHEAP = 100, Bar(1.01, at_most=True)


def compare(settings: Settings) -> list[Comparison]:
    """The look against an update, one after the other."""
    torch.set_num_threads(1)
    size, length = (2, 32) if settings.smoke else (4, 256)
    shape = ModelConfig(name="llama-9m" if settings.smoke else "llama-60m")
    config = models.build_config(shape, vocab_size=512 if settings.smoke else 4096, max_length=length)
    model = models.load(shape, config=config, dtype=torch.float32, device="cpu", seed=0, offline=True)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() != 2 or "layers" not in n]
    optimizer = GaLoreAdamW([{"params": matrices, "rank": 128, "update_proj_gap": 10**6, "refresh": "subspace"},
                             {"params": rest}], lr=1e-3)  # fmt: skip
    ids = torch.randint(3, config.vocab_size, (size, length), generator=torch.Generator().manual_seed(0))

    def update() -> float:
        start = time.perf_counter()
        causal_lm_loss(model, {"input_ids": ids, "labels": ids}, ids.numel()).backward()
        optimizer.step()
        return time.perf_counter() - start

    def look() -> float:
        start = time.perf_counter()
        if broken := first_broken(model, optimizer, Alone(), {}):
            raise SystemExit(f"{broken} is not finite")
        return time.perf_counter() - start

    update()
    ours, peer = [], []
    for _ in range(settings.repeats):
        seconds, looked = update(), look()
        optimizer.zero_grad()
        ours.append(UPDATES * seconds + looked)
        peer.append(UPDATES * seconds)
    console.print(f"guard: the look takes {looked / seconds:.3f} of an update")
    return [
        Comparison("guard", f"{UPDATES} updates and the look before a save, to the updates", "s", ours, peer, CHEAP)
    ]


if __name__ == "__main__":
    answer(compare)
