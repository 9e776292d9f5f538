"""Forward, backward and step of one LLaMA-1B block, projected inside backward, against full-rank fused AdamW.

The block is Transformers' own decoder layer (norms, rotary embedding, sdpa attention, MLP), float32, on a random input
and a random gradient of its output; the input's gradient is computed too, as inside a model. Ours is GaLoreAdamW
through `Gradients`, as in `lowrank pretrain`; its bases are random and none is refreshed. All sides hold the same
weights and take every step in turn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comparison import Bar, Comparison, Settings, answer, console, in_alternation
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lowrank_cli import GaLoreAdamW
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.optim.projection import sides

NO_REFRESH = 10**9
LR = 1e-3
FULL = "full AdamW fused"


@dataclass(frozen=True)
class Shape:
    """A block and its input: `batch` sequences of `length`."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    batch: int
    length: int
    ranks: tuple[int, ...]


LLAMA_1B = Shape("LLaMA-1B layer", 2048, 5461, 32, 8, 256, (512, 256))
TINY = Shape("tiny layer", 64, 171, 4, 2, 32, (16, 8))
# of a quarter of the hidden size and below
FASTER = Bar(1.15)


def compare(settings: Settings) -> list[Comparison]:
    """Each rank against full AdamW, and against ourselves with full gradients."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    shape = TINY if settings.smoke else LLAMA_1B
    block, positions = block_of(shape)
    x = torch.randn(shape.batch, shape.length, shape.hidden)
    dy = torch.randn_like(x) / x.numel()
    sides = {FULL: full_step(block, x, dy, positions)}
    for rank in shape.ranks:
        for in_backward in (True, False):
            sides[name_of(rank, in_backward)] = our_step(block, x, dy, positions, rank, in_backward)
    steps = settings.steps or 1
    console.print(f"block: {shape.name}, {settings.repeats} x {steps} steps of {len(sides)} sides")
    for step in sides.values():
        step()  # state and memory

    def seconds(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps

    times = in_alternation({name: lambda step=step: seconds(step) for name, step in sides.items()}, settings.repeats)
    tokens = shape.batch * shape.length

    def row(rank: int, peer: str, label: str, bar: Bar | None) -> Comparison:
        ours, theirs = ([tokens / t for t in times[name]] for name in (name_of(rank, True), peer))
        what = f"speed of a block's update, {label}: {shape.name} (with attention), {tokens:,} tokens, rank {rank}"
        return Comparison("block", what, "tok/s", ours, theirs, bar)

    return [
        row(rank, *peer)
        for rank in shape.ranks
        for peer in ((FULL, FULL, FASTER), (name_of(rank, False), "ours without in-backward", None))
    ]


def name_of(rank: int, in_backward: bool) -> str:
    """One of our sides."""
    return f"rank {rank}{', in backward' if in_backward else ''}"


def block_of(shape: Shape) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A decoder layer, and the rotary embedding of its positions."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(config, 0).train()
    for p in block.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    ids = torch.arange(shape.length).unsqueeze(0)
    return block, LlamaRotaryEmbedding(config)(torch.zeros(1, shape.length, shape.hidden), ids)


def forward_backward(block: nn.Module, x: Tensor, dy: Tensor, positions: tuple[Tensor, Tensor]) -> None:
    """What all sides do before their step; without a mask sdpa is causal."""
    block(x.detach().requires_grad_(), position_embeddings=positions).backward(dy)


def full_step(block: nn.Module, x: Tensor, dy: Tensor, positions: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """An update of every weight by torch's fused AdamW."""
    block = copy.deepcopy(block)
    optimizer = torch.optim.AdamW(block.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step() -> None:
        forward_backward(block, x, dy, positions)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    block: nn.Module, x: Tensor, dy: Tensor, positions: tuple[Tensor, Tensor], rank: int, in_backward: bool
) -> Callable[[], None]:
    """An update by lowrank's; raises RuntimeError if the gradients are not where they should be."""
    block = copy.deepcopy(block)
    matrices = [p for p in block.parameters() if p.dim() == 2]
    others = [p for p in block.parameters() if p.dim() != 2]
    group = {"params": matrices, "rank": rank, "update_proj_gap": NO_REFRESH, "in_backward": in_backward}
    optimizer = GaLoreAdamW([group, {"params": others}], lr=LR)
    for p in matrices:
        m, n = p.shape
        side = sides(p.shape, "std")[0]
        low_rank = (m, rank) if side == "right" else (rank, n)
        optimizer.state[p] = {
            "step": 1,
            "until_refresh": NO_REFRESH,
            f"basis_{side}": torch.linalg.qr(torch.randn(min(m, n), rank)).Q.contiguous(),
            "exp_avg": torch.zeros(low_rank),
            "exp_avg_sq": torch.zeros(low_rank),
        }
    gradients = Gradients(block, optimizer, per_layer=False, clipping=0.0)

    def step() -> None:
        gradients.begin(measuring=False)
        forward_backward(block, x, dy, positions)
        if any((p.grad is None) != in_backward for p in matrices):
            raise RuntimeError(f"in_backward is {in_backward}, and the full gradients say otherwise")
        gradients.step()

    return step


if __name__ == "__main__":
    answer(compare)
