"""VB-LoRA: low-rank factors composed from one small bank of vectors that the whole model shares.

A targeted linear W (d2 x d1) stays frozen and gets a low-rank addition whose factors are cut into sub-vectors of
length b. Each sub-vector is a mixture of k of the h vectors of the bank, chosen by logits of its own:

    u = sum_j softmax(topk(s, k))_j bank[i_j]
    y = W x + B (A x)       rows of A and columns of B are sub-vectors one after the other; no factor alpha / r

Trained are the bank (h x b) and the logits (S x h, S sub-vectors in the model); stored, in the slim form, the bank and
for each sub-vector k indices and k - 1 weights. Li et al., arXiv:2405.15179, Alg. 1. The factors are composed once an
update, and their gradients go through the mixture once an update: the same maths as doing both in every pass. The
layer is in `layer.py`, the composition in `bank.py`, the files in `files.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli import console
from lowrank_cli.errors import UsageError
from lowrank_cli.fields import option
from lowrank_cli.methods.base import Memory, Method
from lowrank_cli.optim import state_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from lowrank_cli.config import RunConfig

# the paper's vector length, which `auto` does not exceed
VECTOR_LENGTH = 256
# below this a bank is little more than a table of numbers
SHORT = 16
# the adapter that `wrap` makes; PEFT's name
ADAPTER = "default"


class VBLoRA(Method):
    title = "VB-LoRA"
    paper = "https://arxiv.org/abs/2405.15179"
    summary = "tiny adapters, composed from one shared bank of vectors"
    acts_on = frozenset({"weights"})
    commands = frozenset({"finetune"})
    refuses = {
        "--per-layer": "every linear takes its factors from the same bank, so no gradient is whole before the last one"
    }
    adapter = True
    trains_linears = False
    # the head's, for RoBERTa-base on SST-2 and MRPC; bank and logits have their own
    defaults = {"lr": 4e-3, "scheduler": "linear"}

    @dataclass(frozen=True)
    class Config:
        num_vectors: int = option(256, "vectors in the bank (h); the paper has 90 for RoBERTa, 2048 for 7B", min=1)
        vector_length: str = option(
            "auto", "length of a vector (b), or auto: the longest up to 256 that divides every target's sizes"
        )
        rank: int = option(4, "rank of the addition (r)", min=1)
        topk: int = option(2, "vectors mixed in a sub-vector (k)", min=1)
        target_modules: str = option(
            "all-linear",
            "all-linear (attention and feed-forward of every layer), or names and patterns joined by commas",
        )
        dropout: float = option(0.0, "dropout of the addition's input", min=0, below=1)
        lr_vector_bank: float = option(1e-3, "peak learning rate of the bank", above=0)
        lr_logits: float = option(1e-2, "peak learning rate of the logits", above=0)
        init_vector_bank_bound: float = option(
            0.02, "the bank starts uniform between minus this and this", flag="init_bound", above=0
        )
        init_logits_std: float = option(
            0.1, "standard deviation of the first logits; the authors' GLUE code has 0.01", min=0
        )
        save_only_topk_weights: bool = option(
            True,
            "save only what was selected: a small file for inference and merging, not for training on",
            flag="save_only_topk",
        )

    def check(self, run: RunConfig) -> None:
        if self.config.topk > self.config.num_vectors:
            raise UsageError(
                f"--vblora-topk {self.config.topk} is more than the {self.config.num_vectors} vectors of the bank",
                "take fewer, or a larger --vblora-num-vectors",
            )
        length = self.config.vector_length
        if length != "auto" and not (length.isascii() and length.isdigit() and int(length)):
            raise UsageError(f"--vblora-vector-length is '{length}'", "give a whole number, or auto")

    def wrap(self, model: nn.Module) -> None:
        from lowrank_cli.methods.vblora.layer import Shape, VectorBank, attach, dtype_of, sizes_of
        from lowrank_cli.models.adapted import adapted, linears_of

        targets = linears_of(model, adapted(model, self.config.target_modules, self.title, _why_not))
        sizes = {name: sizes_of(module) for name, module in targets.items()}
        length = self.length_for(sizes)
        model.requires_grad_(False)
        bank = VectorBank(
            sizes,
            Shape(self.config.rank, self.config.num_vectors, length, self.config.topk),
            dropout=self.config.dropout,
            compute_dtype=dtype_of(model),
            device=next(iter(targets.values())).weight.device,
            bound=self.config.init_vector_bank_bound,
            std=self.config.init_logits_std,
        )
        attach(model, ADAPTER, bank)

    def length_for(self, sizes: dict[str, tuple[int, int]]) -> int:
        """The vector length for linears of these (in, out) sizes.

        Raises:
            UsageError: the given length does not divide all of them; the hint names those that do.
        """
        common = math.gcd(*(size for pair in sizes.values() for size in pair))
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        if self.config.vector_length == "auto":
            length = max(d for d in divisors if d <= VECTOR_LENGTH)
            console.note(
                f"vector length {length}: the longest up to {VECTOR_LENGTH} that divides every target's sizes"
            )
        else:
            length = int(self.config.vector_length)
        if length not in divisors:
            name, size = next((n, s) for n, pair in sizes.items() for s in pair if s % length)
            raise UsageError(
                f"--vblora-vector-length {length} does not divide the {size} features of {name}",
                f"lengths that divide every target's sizes: {', '.join(map(str, divisors))}; or take auto",
            )
        if length < SHORT:
            console.warn(
                f"vectors of {length} are short, so there are many logits: "
                "choose --vblora-target-modules whose sizes have more in common"
            )
        return length

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        from lowrank_cli.methods.vblora.layer import ATTRIBUTE, adapters_of

        own = {}
        for name, bank in adapters_of(model).items():
            sums = {"subvectors": bank.num_subvectors}
            own[f"{ATTRIBUTE}.{name}.vector_bank"] = {"lr": self.config.lr_vector_bank, **sums}
            own[f"{ATTRIBUTE}.{name}.logits"] = {"lr": self.config.lr_logits}
        tagged = []
        for group in groups:
            rest = [(n, p) for n, p in group["params"] if n not in own]
            if rest:
                tagged.append(group | {"params": rest})
            for name, p in group["params"]:
                if name in own:
                    # the paper decays neither
                    tags = {"params": [(name, p)], "role": "vblora", "weight_decay": 0.0}
                    tagged.append(group | own[name] | tags)
        return tagged

    def treated(self, model: nn.Module, groups: list[dict]) -> set[str]:
        from lowrank_cli.methods.vblora.layer import adapters_of

        return {f"{name}.weight" for bank in adapters_of(model).values() for name in bank.slots}

    def before_step(self, model: nn.Module) -> None:
        """Send the update's summed gradients of all factors through the mixtures, to bank and logits."""
        from lowrank_cli.methods.vblora.layer import adapters_of

        for bank in adapters_of(model).values():
            bank.collect()

    def after_step(self, model: nn.Module, step: int) -> dict[str, float]:
        from lowrank_cli.methods.vblora.layer import adapters_of

        for bank in adapters_of(model).values():
            if bank.vector_bank.requires_grad:
                bank.compose()
        return {}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        # adapters that are not trained; the others are the optimizer's parameters
        from lowrank_cli.methods.vblora.layer import adapters_of

        return {
            f"{name}.{key}": tensor
            for name, bank in adapters_of(model).items()
            if not bank.vector_bank.requires_grad
            for key, tensor in bank.state_dict().items()
        }

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        from lowrank_cli.methods.vblora.layer import adapters_of

        for name, bank in adapters_of(model).items():
            own = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
            bank.load_state_dict(own, strict=bool(own))
            bank.compose()

    def merge(self, model: nn.Module) -> None:
        from lowrank_cli.methods.vblora.layer import merge

        merge(model)

    def save_adapter(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the adapter, and a trained head, as PEFT does."""
        from lowrank_cli.methods.vblora.files import save
        from lowrank_cli.methods.vblora.layer import adapters_of

        adapters = adapters_of(model)
        (name,) = adapters.active
        save(model, adapters[name], folder, base=base, slim=self.config.save_only_topk_weights)

    def load_adapter(self, model: nn.Module, folder: Path, name: str = ADAPTER, trainable: bool = False) -> None:
        """Attach an adapter that this class or PEFT has saved; it becomes the active one.

        Args:
            model: the base model, which is frozen, or one that has other adapters.
            folder: of the adapter.
            name: for it here.
            trainable: go on training it, which its slim form cannot.
        Raises:
            MissingError: there is no adapter.
            UsageError: it is for another base model, or cannot be trained.
        """
        from lowrank_cli.methods.vblora.files import load
        from lowrank_cli.methods.vblora.layer import adapters_of, attach

        bank = load(model, folder)
        if trainable and bank.is_fixed:
            raise UsageError(
                f"the adapter in {folder} holds the selected vectors only, so it cannot be trained on",
                "save it with --no-vblora-save-only-topk, or go on from the run's checkpoint with --resume",
            )
        if not adapters_of(model):
            model.requires_grad_(False)
        bank.requires_grad_(trainable)
        attach(model, name, bank)

    def memory(
        self, shape: tuple[int, ...], dtype_bytes: int = 4, optimizer: str = "adamw", group: dict | None = None
    ) -> Memory:
        # bank and logits are float32 whatever the model is; the factors exist once composed and once as gradients
        size = math.prod(shape)
        factors = (group or {}).get("subvectors", 0) * shape[-1]
        return Memory(
            weights=4 * size + dtype_bytes * factors,
            gradients=4 * size + 4 * factors,
            states=state_bytes(optimizer, shape),
        )


def _why_not(name: str, weight: Tensor) -> str:
    """Return why a weight gets no sub-vectors; empty for a linear's."""
    return "PEFT has no VB-LoRA for tensors of experts" if weight.dim() == 3 else ""
