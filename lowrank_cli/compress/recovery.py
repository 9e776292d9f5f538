"""Win back by training what a compression lost, on the text that it was calibrated with and against the dense model.

    local    block after block: the parameters t of block l minimise  sum |block(h'; t) - h|^2 / sum |h - mean|^2,
             h' what reaches it through the compressed blocks before it, h what the dense model gave there
    whole    then all blocks together: KL(dense || compressed) of the next token

Every block sees the inputs that it will get, which one shot cannot give it. Only what is low-rank trains, and vectors
beside it (biases and norms). AA-SVD tunes blocks so; here the best of the passes on held-out windows is kept, and
the block as it was where none is better, so that no block loses by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_cli.compress.progress import progress
from lowrank_cli.errors import LowrankError
from lowrank_cli.models.lowrank_linear import low_rank_linears
from lowrank_cli.optim import schedule
from lowrank_cli.optim.adamw import GaLoreAdamW
from lowrank_cli.svd.calibration import frozen
from lowrank_cli.svd.layerwise import Chain
from lowrank_cli.svd.shelf import Shelf

PASSES = 5
LOCAL_LR, WHOLE_LR = 5e-4, 2e-4
# of the windows, from all over the text, to choose among the passes by
HELD_OUT = 0.15
MAX_NORM = 1.0


@dataclass
class Recovery:
    """A Recovery tunes a compressed model, block by block.

    Attributes:
        chain: the model as blocks.
        windows: token ids, (B, T) each, at least two of them.
        shelf: for what the dense blocks gave.
        seed: of the order of the windows.
    """

    chain: Chain
    windows: Sequence[Tensor]
    shelf: Shelf
    seed: int

    @property
    def held_out(self) -> list[int]:
        """Return which of the windows are not trained on: at equal distances, for texts of several kinds follow one
        another."""
        count = max(1, round(HELD_OUT * len(self.windows)))
        return [len(self.windows) * (2 * i + 1) // (2 * count) for i in range(count)]

    @property
    def fitted(self) -> list[int]:
        """Return which of the windows are trained on."""
        return [w for w in range(len(self.windows)) if w not in self.held_out]

    @torch.no_grad()
    def remember(self) -> None:
        """Keep what every block of the dense model gives: (B, T, width) for each window and block."""
        with progress("what the dense blocks give", len(self.windows)) as advance:
            for w, ids in enumerate(self.windows):
                hidden, arguments = self.chain.inputs(ids)
                for index, (args, kwargs) in enumerate(arguments):
                    hidden = self.chain.apply(index, hidden, args, kwargs)
                    self.shelf.put(_dense(index, w), {"hidden": hidden})
                advance()

    def recover(self, teacher: nn.Module | None) -> dict[str, float]:
        """Tune block after block; with a teacher then all together.

        Returns:
            For the record: the errors before and after.
        """
        with frozen(self.chain.model):
            errors = self.tune()
            found = {
                "block_error_before": sum(before for before, _ in errors) / len(errors),
                "block_error_after": sum(after for _, after in errors) / len(errors),
            }
            if teacher is not None:
                found["divergence_before"], found["divergence_after"] = self.whole(teacher)
        return found

    def tune(self) -> list[tuple[float, float]]:
        """Tune every block.

        Returns:
            The relative error on held-out windows of each, before and after.
        """
        inputs = [self.chain.inputs(ids)[0] for ids in self.windows]
        errors = []
        with progress("tuning blocks", len(self.chain.layers)) as advance:
            for index, layer in enumerate(self.chain.layers):
                targets = [self.shelf.pop(_dense(index, w))["hidden"] for w in range(len(self.windows))]
                errors.append(self.tune_block(index, layer, inputs, targets))
                with torch.no_grad():
                    inputs = [self.give(index, w, hidden) for w, hidden in enumerate(inputs)]
                advance()
        return errors

    def tune_block(
        self, index: int, layer: nn.Module, inputs: list[Tensor], targets: list[Tensor]
    ) -> tuple[float, float]:
        """Tune one block on all but the held-out windows.

        Args:
            index: of the block.
            layer: the block.
            inputs: what reaches it, (B, T, width) for each window.
            targets: what the dense block gave.
        Returns:
            Its relative error on the held-out windows before and after.
        """
        trained = trainable(layer)
        before = self.error(index, inputs, targets)
        if not trained:
            return before, before
        best, kept = before, [p.detach().clone() for p in trained]
        fit = self.fitted
        updates = Updates(trained, LOCAL_LR, PASSES * len(fit), self.seed)
        for _ in range(PASSES):
            for w in updates.shuffled(fit):
                loss = relative(self.give(index, w, inputs[w]), targets[w])
                updates.step(loss)
            if (now := self.error(index, inputs, targets)) < best:
                best, kept = now, [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p, value in zip(trained, kept, strict=True):
                p.copy_(value)
                p.requires_grad_(False)
        return before, best

    def give(self, index: int, w: int, hidden: Tensor) -> Tensor:
        """Return what a block makes of a window's hidden states, (B, T, width)."""
        args, kwargs = self.chain.inputs(self.windows[w])[1][index]
        return self.chain.apply(index, hidden, args, kwargs)

    @torch.no_grad()
    def error(self, index: int, inputs: list[Tensor], targets: list[Tensor]) -> float:
        """Return a block's mean relative error on the held-out windows."""
        found = [float(relative(self.give(index, w, inputs[w]), targets[w])) for w in self.held_out]
        return sum(found) / len(found)

    def whole(self, teacher: nn.Module) -> tuple[float, float]:
        """Tune all blocks together by the dense model's next-token distributions, one pass over the windows.

        Args:
            teacher: the dense model.
        Returns:
            The mean KL divergence on the held-out windows in nats a token, before and after; what was there stays
            where it is not less.
        """
        model = self.chain.model
        trained = trainable(model)
        kept = [p.detach().clone() for p in trained]
        fit, held = self.fitted, [self.windows[w] for w in self.held_out]
        before = divergence_on(model, teacher, held)
        updates = Updates(trained, WHOLE_LR, len(fit), self.seed)
        with progress("tuning all blocks together", len(fit)) as advance:
            for w in updates.shuffled(fit):
                updates.step(divergence(model, teacher, self.windows[w]))
                advance()
        after = divergence_on(model, teacher, held)
        with torch.no_grad():
            for p, value in zip(trained, kept, strict=True):
                p.requires_grad_(False)
                if not after < before:
                    p.copy_(value)
        return before, min(before, after)


class Updates:
    """AdamW at a cosine from a peak to a tenth of it, clipped; other parameters are frozen while it is there.

    Args:
        trained: parameters.
        lr: the peak.
        steps: in all.
        seed: of the order.
    """

    def __init__(self, trained: list[nn.Parameter], lr: float, steps: int, seed: int):
        self.trained, self.lr, self.done = trained, lr, 0
        self.factor = schedule.build("cosine", warmup_steps=0, total_steps=steps, min_lr_ratio=0.1, num_cycles=1)
        self.generator = torch.Generator().manual_seed(seed)
        for p in trained:
            p.requires_grad_(True)
        self.optimizer = GaLoreAdamW(
            [{"params": trained}], lr=lr, eps=1e-8, weight_decay=0.0, convention="torch",
            stochastic_rounding=any(p.element_size() < 4 for p in trained),
        )  # fmt: skip

    def shuffled(self, what: Sequence[int]) -> Iterator[int]:
        """Yield in an order of its own for every pass."""
        for place in torch.randperm(len(what), generator=self.generator).tolist():
            yield what[place]

    def step(self, loss: Tensor) -> None:
        """Make an update.

        Raises:
            LowrankError: the loss is not finite.
        """
        if not bool(torch.isfinite(loss)):
            raise LowrankError("tuning what was compressed gave a loss that is not finite", "take --recover none")
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return what is trained of a module that has something low-rank: that, and the vectors beside it."""
    low = low_rank_linears(module)
    if not low:
        return []
    own = {p for linear in low.values() for p in linear.parameters()}
    layered = {p for p in module.parameters() if p.dim() < 2}
    return [p for p in module.parameters() if p in own or p in layered]


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error as a share of the variance of what is wanted, over tokens."""
    wanted = wanted.float()
    spread = (wanted - wanted.mean((0, 1))).square().sum().clamp(min=1e-12)
    return (found.float() - wanted).square().sum() / spread


def divergence(model: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """Return KL(teacher || model) of the next token, the mean over a window's tokens, in nats."""
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / ids.numel()


@torch.no_grad()
def divergence_on(model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor]) -> float:
    """Return the mean of `divergence` over windows."""
    return sum(float(divergence(model, teacher, ids)) for ids in windows) / len(windows)


def _dense(index: int, w: int) -> str:
    return f"dense-{index}-{w}"
