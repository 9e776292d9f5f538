"""A small LLaMA, its GaLore groups, gradients to feed to two optimizers at once, and galore-torch in float64."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from double import distance
from transformers import LlamaConfig, LlamaForCausalLM


class Pair:
    """Two models with the same weights; both get the gradients of the second one."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.ours, self.theirs = small_llama().to(dtype), small_llama().to(dtype)
        self.start = weights(small_llama().to(dtype))

    def steps(self, ours, theirs, count: int):
        """Take steps with both optimizers; yields after each."""
        for step in range(count):
            loss_of(self.theirs, step).backward()
            for p, q in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
                p.grad = q.grad.clone()
            ours.step()
            theirs.step()
            theirs.zero_grad()
            yield step

    def run(self, ours, theirs, count: int) -> None:
        for _ in self.steps(ours, theirs, count):
            pass

    def distance(self) -> float:
        """Return the largest distance of two tensors, over how far training took the second model's."""
        return distance(weights(self.ours), weights(self.theirs), self.start)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=64, **shape)
    return LlamaForCausalLM(config)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model, step: int) -> torch.Tensor:
    """Return the loss of the batch of a step."""
    tokens = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens, labels=tokens).loss


def groups_of(model, rank=12, gap=10, scale=0.25, proj_type="std", **more) -> list[dict]:
    projected = [p for name, p in model.named_parameters() if ("attn" in name or "mlp" in name) and p.dim() == 2]
    ids = {id(p) for p in projected}
    plain = [p for p in model.parameters() if id(p) not in ids]
    tags = {"rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": proj_type}
    return [{"params": plain}, {"params": projected, **tags, **more}]


@pytest.fixture(name="small_llama")
def make_small_llama():
    return small_llama


@pytest.fixture(name="loss_of")
def make_loss():
    return loss_of


@pytest.fixture
def pair():
    return Pair()


@pytest.fixture
def single_pair():
    """Return a pair in float32."""
    return Pair(torch.float32)


@pytest.fixture
def galore_groups():
    return groups_of


@pytest.fixture
def reference(monkeypatch):
    """Make an optimizer of galore-torch: reference(name, groups, **settings).

    Its projector would cast a float64 gradient to float32; here it takes float64 for its float.
    """
    import galore_torch
    from galore_torch import galore_projector

    monkeypatch.setattr(galore_projector, "torch", SimpleNamespace(**vars(torch) | {"float": torch.float64}))

    def make(name: str, groups: list[dict], **settings) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(galore_torch, name)(groups, **settings)

    return make
