"""One element of a random tensor becomes NaN or infinite at a random update: nothing that is kept may hold it."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import children
from cases import UNCLEAR, WRONG, Case, Report, counted, look
from materials import MODES, Materials, subjects

INJECTIONS = 50
PLACES = ("weight", "state", "buffer", "gradient")
UPDATES = 12
LINE = f"--max-steps {UPDATES} --save-every 4 --eval-every 4"


def cases(made: Materials, scale: float) -> list[Case]:
    """Return injections over methods, modes, places and updates."""
    found, draw = [], random.Random(0)
    of, modes = subjects(), [m for m in MODES if m != "two processes"]
    for i in range(counted(INJECTIONS, scale)):
        (command, method), place = of[i % len(of)], PLACES[i % len(PLACES)]
        mode = draw.choice(modes) if command == "pretrain" else "plain"
        value, step = draw.choice((float("nan"), float("inf"))), draw.randint(1, UPDATES)
        name = f"{i} {method} {mode} {value} at update {step}"
        run = partial(injected, made, command, method, mode, place, value, step, i)
        found.append(Case("nan", f"{command}, {place}", name, run))
    return found


def injected(made, command: str, method: str, mode: str, place: str, value: float, step: int, seed: int, folder: Path):
    """Train with a value that breaks; returns what is wrong with the end."""
    report, noted = Report(), folder / "noted.json"
    line = made.base_line(method) if command == "pretrain" else made.tune_line(method)
    line = [*line, *LINE.split(), *MODES[mode].split()]
    outcome = children.run(line, folder, before=partial(breaking, place, value, step, seed, noted))
    well = look(report, outcome)
    if not noted.is_file():
        # the method has no such tensor
        return report
    report.strokes += 1
    told = json.loads(noted.read_text())
    kept = broken_files(folder / "run")
    if kept:
        report.add(WRONG, f"{told['name']}: not finite in {', '.join(kept)}, exit code {outcome.code}", outcome)
    names = [part.removesuffix(".weight") for part in told["all"]]
    if not well and not any(name in outcome.err.rpartition("error: ")[2] for name in names):
        report.add(UNCLEAR, f"{told['name']} was broken, and no tensor is named", outcome)
    return report


def broken_files(run: Path) -> list[str]:
    """Return the files of weights and states that hold a value which is not finite."""
    from safetensors.torch import load_file

    return [
        f"{file.relative_to(run)} ({name})"
        for file in sorted(run.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def breaking(place: str, value: float, step: int, seed: int, noted: Path) -> None:
    """Patch the loop of this process: at an update one element becomes another."""
    from lowrank_cli.train import loop

    draw = random.Random(seed)

    def strike(session, tensors: dict) -> None:
        tensors = {name: t for name, t in tensors.items() if t is not None and t.is_floating_point() and t.numel()}
        if tensors:
            name = draw.choice(sorted(tensors))
            tensor = tensors[name].detach()
            at = draw.randrange(tensor.numel())
            tensor[tuple(int(x) for x in unravelled(at, tensor.shape))] = value
            every = [n for n, _ in session.model.named_parameters()] + [n for n, _ in session.model.named_buffers()]
            noted.write_text(json.dumps({"name": name, "all": every}))

    if place == "gradient":
        original = loop.backward

        def backward(session, gradients, stop):
            result = original(session, gradients, stop)
            if session.progress.step == step - 1:
                strike(session, {n: p.grad for n, p in session.model.named_parameters()})
            return result

        loop.backward = backward
        return
    mark = loop.Session.mark

    def marked(session) -> None:
        if session.progress.step == step:
            strike(session, places(session, place))
        mark(session)

    loop.Session.mark = marked


def places(session, place: str) -> dict:
    """Return the tensors of a kind, by name: trained weights, moments and bases, buffers of the methods."""
    groups = session.optimizer.param_groups
    named = {n: p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    if place == "weight":
        return named
    if place == "state":
        return {
            f"{name} {key}": value
            for name, p in named.items()
            for key, value in session.optimizer.state[p].items()
            if hasattr(value, "is_floating_point")
        }
    return session.method_states() or dict(session.model.named_buffers())


def unravelled(index: int, shape) -> list[int]:
    """Return the place of an element in a tensor of a shape."""
    place = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.append(at)
    return place[::-1]
