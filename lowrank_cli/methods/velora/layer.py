"""The VeLoRA wrapper of a linear: its projection vector, and the compressed input that siblings share."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from lowrank_cli.methods.velora.linear import compress, velora_linear
from lowrank_cli.ops.precision import wide
from lowrank_cli.ops.projected_linear import Handle
from lowrank_cli.parallel.replicas import Replicas

FROZEN = ("batch_average_once", "random", "svd")


class Compressor:
    """The projection vector of one input, and its compressed form; q, k and v of a layer share one.

    VeLoRA, arXiv:2405.17991, sec. 3.2 and Table 5c: the vector is the mean of the first training batch's sub-tokens,
    normalised and then frozen (`batch_average_once`). Other `init` values: `batch_average` (of every forward),
    `ema_0.9` (their moving average), `random`, `svd` (the first batch's leading direction).

    Args:
        num_groups: G; it divides the features.
        init: how the vector is found.
        seed: of a random vector.
    """

    def __init__(self, num_groups: int, init: str, seed: int):
        self.num_groups, self.init, self.seed = num_groups, init, seed
        self.vector: Tensor | None = None  # (M,), float32 or float64
        self.users = 0  # linears that call this with the same tensor
        self._last: tuple[weakref.ref, Tensor, int] | None = None  # the tensor, its compressed form, calls to come
        self.replicas: Replicas | None = None  # processes that have to find the same vector

    @property
    def is_frozen(self) -> bool:
        """Return whether the vector stays once it is found, so that moments and sums on F keep their meaning."""
        return self.init in FROZEN

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed input (..., G) and the vector (M,) that it was compressed with."""
        if self._last is not None and self._last[0]() is x:
            _, kept, left = self._last
        else:
            if self.vector is None or not self.is_frozen:
                self.vector = self._find(x.detach())
            kept, left = compress(x.detach(), self.vector), self.users
        # kept no longer than the last of the siblings needs it
        self._last = (weakref.ref(x), kept, left - 1) if left > 1 else None
        return kept, self.vector

    def _find(self, x: Tensor) -> Tensor:
        subtokens = x.to(wide(x.dtype)).reshape(-1, x.shape[-1] // self.num_groups)  # (N G, M)
        if self.init == "random":
            generator = torch.Generator().manual_seed(self.seed)
            vector = torch.randn(subtokens.shape[1], generator=generator).to(subtokens)
        elif self.init == "svd":
            vector = torch.linalg.eigh(self._total(subtokens.mT @ subtokens)).eigenvectors[:, -1]
            if self.replicas is not None:
                self.replicas.broadcast_([vector])
        else:
            vector = self._mean(subtokens)
            if self.init.startswith("ema_") and self.vector is not None:
                decay = float(self.init.removeprefix("ema_"))
                vector = decay * self.vector + (1 - decay) * nn.functional.normalize(vector, dim=0)
        norm = vector.norm()
        # an input of zeros has no direction: all features alike
        flat = torch.full_like(vector, vector.numel() ** -0.5)
        return torch.where(norm > 0, vector / norm, flat)

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.replicas is not None:
            self.replicas.sum_([tensor])
        return tensor

    def _mean(self, subtokens: Tensor) -> Tensor:
        """The mean over all sub-tokens of all processes: normalised means of each would not be that of the batch."""
        if self.replicas is None:
            return subtokens.mean(0)
        total = self._total(torch.cat([subtokens.sum(0), subtokens.new_tensor([len(subtokens)])]))
        return total[:-1] / total[-1]


class VeLoRA:
    """A VeLoRA wraps a linear: it holds the compressor of its input, and the space that its factored gradient goes to.

    Args:
        module: the linear.
        compressor: shared with the linears that have the same input.
        scale: factor of the weight's gradient.
    """

    def __init__(self, module: nn.Linear, compressor: Compressor, scale: float):
        self.module, self.compressor, self.scale = module, compressor, scale
        self.handle = Handle()  # to the space that takes the gradient as a factor
        compressor.users += 1
        module.factored_gradient = self
        module.forward = self.forward

    def current_vector(self) -> Tensor | None:
        """The projection vector; None before the first training batch."""
        return self.compressor.vector

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output; in training only the compressed input is kept for backward."""
        module = self.module
        if not (torch.is_grad_enabled() and module.training and module.weight.requires_grad):
            return nn.functional.linear(x, module.weight, module.bias)
        kept, vector = self.compressor(x)
        factored = self.handle.serves(module.weight) and not module.weight._backward_hooks
        (leaf,) = self.handle.space.leaves if factored else (None,)
        return velora_linear(x, module.weight, module.bias, kept, vector, self.scale, leaf)
