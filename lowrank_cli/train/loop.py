"""The training loop: the only one. It knows no method by name.

`fit` reads top to bottom: set up, then for every update forward and backward over its micro-batches, clip, step, and
now and then report, evaluate and save. `Session` holds what those share.
"""

from __future__ import annotations

import math
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli import console, methods, plots
from lowrank_cli.config import RunConfig, to_yaml
from lowrank_cli.errors import Interrupted, LowrankError, UsageError
from lowrank_cli.models.share import Share
from lowrank_cli.optim import schedule
from lowrank_cli.optim.exchange import Exchange, Replicated, Sharded
from lowrank_cli.optim.gradients import Gradients
from lowrank_cli.parallel.replicas import Alone
from lowrank_cli.parallel.sharding import reshard, reunite
from lowrank_cli.parallel.shards import full_numel
from lowrank_cli.run import RunDir, write_json
from lowrank_cli.train import audit, checkpoint, finish, plan
from lowrank_cli.train.metrics import Follower, Reporter
from lowrank_cli.train.objective import Causal, is_better, mean_line
from lowrank_cli.train.setup import adapter_of


@dataclass
class Session:
    """A run's parts, built once by `train.prepare.prepare`."""

    config: RunConfig
    data: Any
    model: nn.Module
    parts: list[methods.Method]
    optimizer: torch.optim.Optimizer
    plan: plan.Plan
    device: torch.device
    targets: list[dict[str, Any]]
    share: Share  # of the layers that the methods act on
    objective: Causal = field(default_factory=Causal)
    base: str = ""  # where an adapter's base model is
    replicas: Alone = field(default_factory=Alone)  # the processes that train it
    run: RunDir | None = None
    progress: checkpoint.Progress = field(default_factory=checkpoint.Progress)
    rng: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)

    def mark(self) -> None:
        """Remember where data, random generators and methods stand: what a checkpoint of this moment holds.

        A signal may end the next update between two of its micro-batches, whose forward passes move them on.
        """
        self.progress.data = self.data.train.state_dict()
        self.rng = checkpoint.rng_state()
        self.states = self.method_states()

    @property
    def adapter(self) -> methods.Method | None:
        """The method that trains an adapter on a frozen base, if one does."""
        return adapter_of(self.parts)

    def method_states(self) -> dict[str, Tensor]:
        """The methods' own tensors."""
        return {f"{m.name}|{k}": v for m in self.parts for k, v in m.state(self.model).items()}

    def load_method_states(self, states: dict[str, Tensor]) -> None:
        """Put them back; called after the weights, from which a method may compose others."""
        for m in self.parts:
            m.load_state(self.model, {k.partition("|")[2]: v for k, v in states.items() if k.startswith(f"{m.name}|")})

    def check(self) -> None:
        """Raise LowrankError unless all that a checkpoint would hold is finite; all processes call it."""
        broken = audit.first_broken(self.model, self.optimizer, self.replicas, self.states)
        if broken:
            raise LowrankError(
                f"{broken} holds a value that is not finite after step {self.progress.step}", way_out(self)
            )

    def save(self) -> None:
        """Write a checkpoint of the last whole update; what the processes hold alike has to be the same on each.

        Raises:
            LowrankError: a value is not finite, or it could not be written.
        """
        self.check()
        if self.replicas.world_size > 1:
            audit.check_replicas(self.replicas, self.optimizer, self.progress.step)
        adapter = self.adapter is not None
        if not self.replicas.is_main and (adapter or not self.replicas.sharded):
            return
        checkpoint.save(
            self.run.checkpoints,
            model=self.model,
            tokenizer=self.data.tokenizer,
            optimizer=self.optimizer,
            method_states=self.states,
            progress=self.progress,
            rng=self.rng,
            settings=to_yaml(self.config),
            keep=self.config.train.keep,
            adapter=adapter,
            replicas=self.replicas,
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.progress, states = checkpoint.load(
            path, model=self.model, optimizer=self.optimizer, replicas=self.replicas
        )
        self.load_method_states(states)
        try:
            self.data.train.load_state_dict(self.progress.data)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UsageError(
                f"the checkpoint {path} is damaged: progress.json has no position in the data ({error})",
                "take an older one, or start again without --resume",
            ) from None


def fit(session: Session, run: RunDir, *, resume: Path | None = None) -> dict[str, Any]:
    """Train a model; the run folder then holds it, its metrics and its checkpoints.

    Args:
        session: what `prepare` made of the configuration.
        run: the run folder.
        resume: a checkpoint to go on from, bit for bit.
    Returns:
        What the run came to: steps, tokens, losses, perplexities, times, memory.
    Raises:
        LowrankError: the loss is not finite, nothing would train, or a file could not be written.
        Interrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
        LostRank: another process does not answer.
    """
    config, session.run, replicas = session.config, run, session.replicas
    begin(session, resume)
    progress, steps = session.progress, session.plan
    factor = schedule.build(
        config.optim.scheduler,
        warmup_steps=steps.warmup_steps,
        total_steps=steps.steps,
        min_lr_ratio=config.optim.min_lr_ratio,
        num_cycles=config.optim.num_cycles,
    )
    drawing = plots.Drawing(run) if config.train.plots and replicas.is_main else None
    gradients = gradients_of(session)
    session.mark()
    reporter = (Reporter if replicas.is_main else Follower)(
        run,
        config,
        total=steps.steps,
        progress=progress,
        device=session.device,
        causal=session.objective.causal,
        resumed=resume is not None,
    )
    with Stop(replicas) as stop, reporter as report:
        if steps.evaluates(progress.step) and progress.evaluated != progress.step:
            # the first one, or one that a signal has cut off
            evaluate(session, report, stop)
        for step in range(progress.step + 1, steps.steps + 1):
            stop.check_all(session)
            reporting = step % config.train.log_every == 0 or step in (1, steps.steps)
            numbers = update(
                session, gradients, stop, step, factor=factor(step), measuring=reporting or steps.saves(step)
            )
            report.advance()
            if reporting:
                report.training(**numbers)
            with report.paused():
                if steps.evaluates(step):
                    evaluate(session, report, stop)
                enough = out_of_patience(session)
                if steps.saves(step) or enough:
                    session.save()
                if drawing and steps.saves(step) and step < steps.steps:
                    drawing.start()
            if enough:
                console.note(f"no better evaluation for {progress.worse} times: stopped after step {step}")
                break
        gradients.close()
        if drawing:
            drawing.finish()
        if replicas.sharded:
            reunite(session.model, replicas)
        return finish.finish(session) if replicas.is_main else {}


def begin(session: Session, resume: Path | None) -> None:
    """Write down what is trained, and go on from a checkpoint if there is one."""
    run = session.run
    if session.replicas.is_main:
        write_json(run.path / "targets.json", session.targets)
    run.update(
        parameters=sum(p.numel() for p in session.model.parameters()),
        **session.share.record(),
        trainable_parameters=sum(full_numel(p) for g in session.optimizer.param_groups for p in g["params"]),
        device=str(session.device),
        dtype=str(session.model.dtype).removeprefix("torch."),
        data=session.data.description,
        plan=asdict(session.plan),
    )
    if resume is not None:
        session.load(resume)
        console.note(f"resumed from {resume}, at step {session.progress.step} of {session.plan.steps}")


def gradients_of(session: Session) -> Gradients:
    """Return what collects the gradients of a run, on one process or on several."""
    config, replicas = session.config.optim, session.replicas
    exchange = Exchange()
    if replicas.world_size > 1:
        exchange = Sharded(replicas) if replicas.sharded else Replicated(replicas)
        for part in session.parts:
            part.distribute(session.model, replicas)
    return Gradients(
        session.model,
        session.optimizer,
        per_layer=config.per_layer,
        clipping=config.grad_clipping,
        exchange=exchange,
    )


def update(
    session: Session, gradients: Gradients, stop: Stop, step: int, *, factor: float, measuring: bool
) -> dict[str, float | None]:
    """Make one update.

    Args:
        session: whose progress moves on.
        gradients: of the run.
        stop: asked between micro-batches.
        step: its number, from 1.
        factor: of the peak learning rate.
        measuring: whether the norm is wanted.
    Returns:
        loss, lr, grad_norm and what the methods report.
    Raises:
        LowrankError: a number is not finite, or nothing would train.
    """
    progress, replicas, optimizer = session.progress, session.replicas, session.optimizer
    replicas.begin(step)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    first = audit.Snapshot(optimizer) if step == 1 else None
    gradients.begin(measuring=measuring)
    try:
        loss, tokens = backward(session, gradients, stop)
        for part in session.parts:
            part.before_step(session.model)
        gradients.reduce()
        grad_norm = clip(session, gradients)
        gradients.step()
    except FloatingPointError as error:
        raise not_finite(session, str(error)) from None
    if first is not None:
        first.check(optimizer, gradients.zeros)
    extra = {k: v for part in session.parts for k, v in part.after_step(session.model, step).items()}
    if replicas.world_size > 1:
        extra["sent_bytes"] = replicas.sent_bytes
    progress.step, progress.tokens = step, progress.tokens + tokens
    session.mark()
    return {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm, **extra}


def backward(session: Session, gradients: Gradients, stop: Stop) -> tuple[float, int]:
    """Gradients of one update over its micro-batches; returns the mean loss and the number of its tokens."""
    batches, objective, replicas = session.data.train.next_update(), session.objective, session.replicas
    targets, tokens = map(int, replicas.numbers(objective.targets(batches), objective.tokens(batches)))
    # every micro-batch is divided by the update's own number of targets, so accumulation is exact
    targets = max(1, targets)
    total: Tensor | float = 0.0
    for i, batch in enumerate(batches):
        stop.check(session)
        batch = {key: value.to(session.device, non_blocking=True) for key, value in batch.items()}
        loss = objective.loss(session.model, batch, targets)
        total = total + loss.detach()
        gradients.last = i == len(batches) - 1
        if gradients.last:
            # the one synchronisation of an update, before anything can step: a broken loss never reaches the weights
            (total,) = replicas.numbers(float(total))
            if not math.isfinite(total):
                raise not_finite(session, f"the loss is {total}")
        loss.backward()
    return total, tokens


def clip(session: Session, gradients: Gradients) -> float | None:
    """The gradients' global norm, clipped if the configuration says so; None if nobody wants to know.

    Raises:
        LowrankError: it is not finite.
    """
    if not (gradients.clipping or gradients.measuring):
        return None
    value = float(gradients.norm())
    if not math.isfinite(value):
        raise not_finite(session, f"the gradient's norm is {value}")
    return value


def not_finite(session: Session, what: str, step: int | None = None) -> LowrankError:
    """Return the end of a run whose numbers broke: the step (the next one unless given), the tensor, the last good
    checkpoint."""
    broken = audit.first_broken(session.model, session.optimizer, session.replicas, session.states)
    # rotary frequencies and the like are in no checkpoint, but a run that has broken ones breaks
    buffers = (n for n, b in session.model.named_buffers() if b.is_floating_point() and not bool(b.isfinite().all()))
    broken = broken or next((f"the buffer {name}" for name in buffers), "")
    where = (
        f"the first tensor with a non-finite value is {broken}"
        if broken
        else "all weights, moments and gradients are finite, so it arose in the forward pass"
    )
    step = session.progress.step + 1 if step is None else step
    return LowrankError(f"{what} at step {step}; {where}", way_out(session))


def way_out(session: Session) -> str:
    """Return what to do when numbers broke; what a checkpoint holds was looked at before it was written."""
    whole = checkpoint.newest(session.run.checkpoints, session.progress.step)
    # nothing else can begin from the checkpoint of an adapter, which has no base with it, or from one that is cut
    flag = "--continue-from" if session.config.command == "pretrain" else "--model"
    good = f"{whole} is good: go on from it with {flag} {whole}" if whole else "there is no earlier checkpoint"
    good = "start again" if session.adapter is not None or session.replicas.sharded else good
    return f"{good}; a lower --lr, --grad-clipping 1.0 or a longer --warmup-steps may help"


class Stop:
    """Ctrl-C, SIGTERM, a lost terminal: the first asks for a checkpoint and an orderly end, the second ends at once.

    Of several processes one that is asked is enough; all end after the same update.
    """

    def __init__(self, replicas: Alone):
        self.asked: str | None = None
        self.replicas = replicas

    def __enter__(self) -> Stop:
        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            # nohup means that a run outlives its terminal
            asking.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self.ask) for number in asking}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self.replicas.world_size == 1:
            console.note(f"{self.asked}: saving a checkpoint; once more to stop without")

    def check(self, session: Session) -> None:
        """Between two micro-batches: save the last whole update and end, if that was asked for."""
        if self.asked and self.replicas.world_size == 1:
            self._end(session)

    def check_all(self, session: Session) -> None:
        """Between two updates, where all processes meet: the same, if any of them was asked."""
        if self.replicas.world_size == 1:
            self.check(session)
        elif self.replicas.numbers(self.asked is not None)[0]:
            self.asked = self.asked or "a signal to another rank"
            self._end(session)

    def _end(self, session: Session) -> None:
        step = session.progress.step
        if step:
            session.save()
        raise Interrupted(
            f"stopped by {self.asked} after step {step} of {session.plan.steps}",
            f"go on with: lowrank {session.config.command} --resume {session.run.path}"
            if step
            else "nothing was trained yet",
        )


def evaluate(session: Session, report: Reporter, stop: Stop) -> None:
    """An evaluation, reported and remembered; of a task, the best weights so far are kept on disk."""
    values = session.objective.evaluate(
        session.model, session.data, between=lambda: stop.check(session), replicas=session.replicas
    )
    progress = session.progress
    progress.evaluation, progress.evaluated = values, progress.step
    if progress.step == 0:
        progress.start = values
    if session.replicas.sharded:
        reshard(session.model)
    report.evaluation(values, mean_line(values))
    if not math.isfinite(values["loss"]):
        raise not_finite(session, f"the validation loss is {values['loss']}", progress.step)
    if session.config.task is None or progress.step == 0:
        # what was not trained is never the best
        return
    better = not progress.best or is_better(values, progress.best, *session.objective.best)
    progress.worse = 0 if better else progress.worse + 1
    # of two that are as good the later one has seen more
    if better or not is_better(progress.best, values, *session.objective.best):
        session.check()
        progress.best = {**values, "step": progress.step}
        if session.config.task.keep_best:
            keep_best(session)


def keep_best(session: Session) -> None:
    """Write best/: what trains, as it is now."""
    tensors = checkpoint.trainable(session.model, keeping=session.replicas.is_main)
    if session.replicas.is_main:
        base = checkpoint.base_fingerprint(session.model)
        folder, step = session.run.path / "best", session.progress.step
        checkpoint.save_best(folder, tensors, base, session.method_states(), step)


def out_of_patience(session: Session) -> bool:
    """Return whether a task has been evaluated as often as its patience allows without getting better."""
    patience = session.config.task.patience if session.config.task is not None else None
    return patience is not None and session.progress.worse >= patience
