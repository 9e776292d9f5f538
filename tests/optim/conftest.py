"""A small LLaMA, its GaLore groups, and gradients to feed to two optimizers at once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Pair:
    """Two models with the same weights; both get the gradients of the second one."""

    def __init__(self, dtype=torch.float32):
        self.ours, self.theirs = small_llama().to(dtype), small_llama().to(dtype)

    def run(self, ours, theirs, steps: int) -> None:
        for step in range(steps):
            tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(step))
            self.theirs(input_ids=tokens, labels=tokens).loss.backward()
            for p, q in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
                p.grad = q.grad.clone()
            ours.step()
            theirs.step()
            theirs.zero_grad()

    def difference(self) -> float:
        """The largest relative difference of a tensor."""
        pairs = zip(self.ours.parameters(), self.theirs.parameters(), strict=True)
        return max(float((p - q).detach().float().norm() / q.detach().float().norm()) for p, q in pairs)

    def moved(self) -> float:
        """How far training took the second model, relative to where it began."""
        pairs = zip(small_llama().parameters(), self.theirs.parameters(), strict=True)
        return max(float((p - q).detach().float().norm() / p.detach().float().norm()) for p, q in pairs)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=64, **shape)
    return LlamaForCausalLM(config)


def groups_of(model, rank=12, gap=10, scale=0.25, proj_type="std", **more) -> list[dict]:
    projected = [p for name, p in model.named_parameters() if ("attn" in name or "mlp" in name) and p.dim() == 2]
    ids = {id(p) for p in projected}
    plain = [p for p in model.parameters() if id(p) not in ids]
    tags = {"rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": proj_type}
    return [{"params": plain}, {"params": projected, **tags, **more}]


@pytest.fixture
def pair():
    return Pair()


@pytest.fixture
def galore_groups():
    return groups_of
