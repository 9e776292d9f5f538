"""VeLoRA: activations kept for backward as one number for each group of features.

A wrapped linear y = x W^T (W: m x D) cuts the D features of its input into G groups of M, and keeps for backward the
coordinate of each group along one fixed unit vector v:

    zp = x.view(N, G, M) @ v          N x G numbers instead of N x D
    F  = scale * dY^T zp              m x G;  the weight's gradient is F (x) v and is never formed

The output and dX are exact; the weight's gradient is that of an input whose groups all point along v. With v fixed,
Adam on F (x) v factorises: moments m_F and v_F of m x G numbers give exactly the update of dense Adam,

    W[o, g, j] <- W[o, g, j] - lr * (m^_F v_j) / (sqrt(v^_F) |v_j| + eps)

so gradient, accumulation and both moments shrink by M as well. Miles et al., arXiv:2405.17991, Alg. 1; the factored
form is derived in docs/methods/velora.md. `scale` cancels under Adam. The layer is in `methods/velora/layer.py` and
`methods/velora/linear.py`, the update in `methods/velora/space.py`; this file says which linears are wrapped and how.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from lowrank_cli import methods
from lowrank_cli.errors import UsageError
from lowrank_cli.fields import option
from lowrank_cli.methods.base import Memory, Method
from lowrank_cli.optim import state_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowrank_cli.config import RunConfig
    from lowrank_cli.parallel.replicas import Alone

# linears that are several in one: they read one input, and are wrapped as one
QKV, GATE_UP = ("qkv_proj", "query_key_value", "Wqkv"), ("gate_up_proj",)
# the letters of the paper's tables, for LLaMA-like names and for others
LETTERS = {
    "q": ("q_proj", "query", *QKV),
    "k": ("k_proj", "key", *QKV),
    "v": ("v_proj", "value", *QKV),
    "o": ("o_proj", "out_proj", "attention.output.dense", "attention.dense"),
    "g": ("gate_proj", *GATE_UP),
    "u": ("up_proj", "intermediate.dense", "dense_h_to_4h", "fc1", "fc_in", *GATE_UP),
    "d": ("down_proj", "output.dense", "dense_4h_to_h", "fc2", "fc_out"),
}
# linears of a layer that read the same tensor: wrapping some of them frees nothing
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
# a linear in two: which of them has the input, and which has not; of LoRA, and of WeLore's two forms
FIRST, SECOND = (".lora_A.default", ".B", ".pivots"), (".lora_B.default", ".A", ".others")
# the paper's choice of layers
PAPERS = "vd"
# features in a group, where num_groups is left open
GROUP_SIZE = 16


class VeLoRA(Method):
    title = "VeLoRA"
    paper = "https://arxiv.org/abs/2405.17991"
    summary = "activations kept as one number for each group of features"
    acts_on = frozenset({"activations"})
    commands = frozenset({"pretrain", "finetune"})
    presets = {"llama-60m": {"num_groups": "64,86"}, "llama-130m": {"num_groups": "64,64"}}

    @dataclass(frozen=True)
    class Config:
        layers: str = option(PAPERS, "letters of q k v o g u d, or names and patterns joined by commas")
        num_groups: str | None = option(
            None, "groups of features, one number or one for each letter or name; features / 16 unless given"
        )
        group_size: int | None = option(None, "features in a group instead of their number", min=1)
        init: str = option(
            "batch_average_once", "the vector: batch_average_once as in the paper, batch_average, ema_0.9, random, svd"
        )
        scale: float = option(1.0, "factor of the weight's gradient; it cancels under Adam", above=0)

    def check(self, run: RunConfig) -> None:
        other = next((name for name in run.methods if not methods.get(name).trains_linears), None)
        if other is not None:
            raise UsageError(
                f"velora makes small what trained linears keep for backward, and {other} trains none",
                f"take --method {other} alone, or lora+velora",
            )

    def wrap(self, model: nn.Module) -> None:
        import zlib

        from lowrank_cli.methods.velora.layer import Compressor
        from lowrank_cli.methods.velora.layer import VeLoRA as Layer

        self.check_init()
        if self.config.init.startswith("ema_") and getattr(model, "is_gradient_checkpointing", False):
            raise UsageError(
                f"--velora-init {self.config.init} moves its vector again when activations are recomputed",
                "take --velora-init batch_average_once, or leave out --activation-checkpointing",
            )
        compressors: dict[tuple, Compressor] = {}
        for name, (module, num_groups) in self.targets(model).items():
            parent, _, leaf = plain_name(name).rpartition(".")
            family = next((s for s in SIBLINGS if leaf in s), (leaf,))
            seed = zlib.crc32(f"{parent} {family}".encode())
            key = (parent, family, num_groups)
            Layer(
                module, compressors.setdefault(key, Compressor(num_groups, self.config.init, seed)), self.config.scale
            )

    def treated(self, model: nn.Module, groups: list[dict]) -> set[str]:
        return {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "factored_gradient")}

    def check_init(self) -> None:
        """Raises UsageError for an init that there is not."""
        init, known = self.config.init, ("batch_average_once", "batch_average", "random", "svd", "ema_0.9")
        try:
            fits = init in known or (init.startswith("ema_") and 0 <= float(init[4:]) < 1)
        except ValueError:
            fits = False
        if not fits:
            raise UsageError(f"--velora-init is '{init}'", f"it takes one of: {', '.join(known)}")

    def targets(self, model: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
        """The linears to wrap, by name, each with its number of groups.

        Raises:
            UsageError: a letter or name that the model does not have, or groups that do not divide the features.
        """
        from torch.nn import Linear

        text = self.config.layers
        parts = (
            [p.strip() for p in text.split(",") if p.strip()]
            if "," in text or not set(text) <= set(LETTERS)
            else list(text)
        )
        counts = [c.strip() for c in (self.config.num_groups or "").split(",") if c.strip()]
        if len(counts) not in (0, 1, len(parts)):
            raise UsageError(
                f"--velora-num-groups has {len(counts)} numbers for {len(parts)} kinds of layers",
                f"give one, or one for each of: {' '.join(parts)}",
            )
        found: dict[str, tuple[Linear, int]] = {}
        candidates = self.candidates(model)
        for i, part in enumerate(parts):
            if part in LETTERS:
                names = [n for n in candidates if n.endswith(tuple(f".{leaf}" for leaf in LETTERS[part]))]
                names = names if part != "d" else [n for n in names if not n.endswith("attention.output.dense")]
                chosen = [candidates[n] for n in names]
            else:
                chosen = [found for n, found in candidates.items() if part in n or fnmatch(n, part)]
            chosen = [(name, module) for name, module in chosen if type(module) is Linear]
            # a mixture of experts has no down projection that is a linear: the paper's choice is what there is of it
            if not chosen and (text != PAPERS or (i == len(parts) - 1 and not found)):
                leaves = sorted({n.rpartition(".")[2] for n, (_, m) in candidates.items() if type(m) is Linear})
                raise UsageError(
                    f"--velora-layers {text}: this model has no trained linear {part}",
                    f"letters: {' '.join(LETTERS)}; names: {', '.join(leaves)}",
                )
            wanted = counts[i if len(counts) > 1 else 0] if counts else None
            for name, module in chosen:
                found[name] = (module, self.groups_for(name, module.in_features, wanted))
        return found

    def candidates(self, model: nn.Module) -> dict[str, tuple[str, nn.Linear]]:
        """The linears that train, by the name that a user knows: the first half of a LoRA, or of a linear of low rank,
        by that of the whole.

        Returns:
            Each with its own full name.
        """
        from lowrank_cli.models.targets import linears

        training = {n: m for n, m in linears(model).items() if m.weight.requires_grad}
        halves = {plain_name(n) + second for n in training for second in SECOND if n.endswith(FIRST)}
        return {plain_name(n): (n, m) for n, m in training.items() if n not in halves}

    def groups_for(self, name: str, features: int, wanted: str | None) -> int:
        """The number of groups of an input; raises UsageError naming the nearest divisors."""
        if wanted is None and self.config.group_size is None:
            return next(features // size for size in range(min(GROUP_SIZE, features), 0, -1) if features % size == 0)
        try:
            number = int(wanted) if wanted is not None else self.config.group_size
        except ValueError:
            raise UsageError(f"--velora-num-groups is '{wanted}'", "give whole numbers, such as 64,86") from None
        if number < 1 or features % number:
            divisors = [d for d in range(1, features + 1) if features % d == 0]
            below, above = [d for d in divisors if d < number][-1:], [d for d in divisors if d > number][:1]
            flag = "--velora-num-groups" if wanted is not None else "--velora-group-size"
            near = ", ".join(map(str, below + above))
            raise UsageError(f"{flag} {number} does not divide the {features} features of {name}", f"nearest: {near}")
        return number if wanted is not None else features // number

    def param_groups(self, model: nn.Module, groups: list[dict]) -> list[dict]:
        from lowrank_cli.methods.velora.space import Factored

        wrapped = {
            f"{n}.weight": m.factored_gradient for n, m in model.named_modules() if hasattr(m, "factored_gradient")
        }
        tagged = []
        for group in groups:
            own = [(n, p) for n, p in group["params"] if n in wrapped]
            rest = [(n, p) for n, p in group["params"] if n not in wrapped]
            if rest:
                tagged.append(group | {"params": rest})
            for name, p in own:
                layer = wrapped[name]
                why = self.freed(model, name, layer.compressor.num_groups, p.shape[1])
                tags = {"params": [(name, p)], "role": "velora", "why": why}
                frozen = layer.compressor.is_frozen
                own = {"num_groups": layer.compressor.num_groups, "space": Factored} if frozen else {}
                tagged.append(group | tags | own)
        return tagged

    def freed(self, model: nn.Module, name: str, num_groups: int, features: int) -> str:
        """Say what wrapping this weight's linear frees: nothing where an unwrapped sibling keeps the same input."""
        parent, _, leaf = plain_name(name.removesuffix(".weight")).rpartition(".")
        training = self.candidates(model)
        siblings = [
            s for s in next((s for s in SIBLINGS if leaf in s), ()) if s != leaf and f"{parent}.{s}" in training
        ]
        keeping = [s for s in siblings if not hasattr(training[f"{parent}.{s}"][1], "factored_gradient")]
        if keeping:
            return f"frees nothing: {' and '.join(keeping)} keep the same input"
        return f"keeps {num_groups} of {features} numbers a token"

    def distribute(self, model: nn.Module, replicas: Alone) -> None:
        for module in model.modules():
            if hasattr(module, "factored_gradient"):
                module.factored_gradient.compressor.replicas = replicas

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        found = {
            n: m.factored_gradient.current_vector()
            for n, m in model.named_modules()
            if hasattr(m, "factored_gradient")
        }
        return {name: vector.clone() for name, vector in found.items() if vector is not None}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        for name, vector in state.items():
            module = model.get_submodule(name)
            module.factored_gradient.compressor.vector = vector.to(module.weight.device)

    def memory(
        self, shape: tuple[int, ...], dtype_bytes: int = 4, optimizer: str = "adamw", group: dict | None = None
    ) -> Memory:
        if not group or "num_groups" not in group:
            # a vector that changes has no factored moments: the gradient is dense
            return super().memory(shape, dtype_bytes, optimizer)
        factor = (shape[0], group["num_groups"])
        size = shape[0] * shape[1] * dtype_bytes
        return Memory(weights=size, gradients=4 * factor[0] * factor[1], states=state_bytes(optimizer, factor))


def plain_name(name: str) -> str:
    """The name of the linear that another one is the first half of; of any other its own."""
    return next((name.removesuffix(first) for first in FIRST if name.endswith(first)), name)
