"""Runs in float64, where rounding is too small for any bound to depend on the processor."""

import torch
from torch import nn
from transformers.integrations import moe
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from lowrank_cli.models import load

# rounding is 1e-16; Adam divides by no less than eps, 1e-8, which may make 1e-8 of that; refreshes of a basis and a
# dozen updates get the factor that is left. A wrong scale, side, step or decay is above 1e-3.
BOUND = 1e-6


def exact_norm(self, hidden_states):
    """Normalise without the detour through float32 that Transformers' own forward takes."""
    return nn.functional.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.variance_epsilon)


def use_double(setattr) -> None:
    """Make every run's weights float64, whatever dtype it asks for; `setattr` is a monkeypatch's."""
    setattr(load, "dtype_of", lambda name, device: torch.float64)
    for kind in (LlamaRMSNorm, MixtralRMSNorm):
        setattr(kind, "forward", exact_norm)
    # torch's grouped product takes 32 bits at most
    setattr(moe, "_can_use_grouped_mm", lambda *_: False)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of a tensor of `a` from that of `b`, over how far `b` has gone from the start.

    Tensors that have not moved have to be equal.
    """
    assert a.keys() == b.keys()
    furthest = 0.0
    for name, tensor in b.items():
        if not tensor.is_floating_point():
            assert tensor.equal(a[name]), name
            continue
        apart = float((a[name].double() - tensor.double()).norm())
        moved = float((tensor.double() - start[name].double()).norm())
        assert moved or not apart, f"{name} has moved in one run only"
        furthest = max(furthest, apart / moved if moved else 0.0)
    return furthest
