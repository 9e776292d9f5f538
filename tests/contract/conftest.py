"""Runs of any method in any mode, in float64, kept for the tests that compare with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path

import double
import pytest
import torch
from watched import TOYS, register_toys, watch

from lowrank_cli import methods
from lowrank_cli.config import resolve
from lowrank_cli.errors import UsageError


@contextmanager
def toys_registered():
    """Register the methods of toys/ beside the product's own."""
    with ExitStack() as undo:
        register_toys(undo)
        yield


@dataclass(frozen=True)
class Subject:
    """A method, or several, in one command."""

    command: str
    method: str
    parts: tuple[type[methods.Method], ...] = field(compare=False)
    toy: bool = False
    experts: bool = False  # on a mixture of experts

    def __str__(self) -> str:
        return f"{self.command}-{self.method}" + ("-experts" if self.experts else "")

    @property
    def compresses(self) -> bool:
        """Whether it fine-tunes what `lowrank compress` has made."""
        return any("compress" in part.commands for part in self.parts)

    @property
    def adapts(self) -> bool:
        """Whether it trains an adapter beside a frozen base."""
        return self.command == "finetune" and any(
            part.adapter or "adapter_rank" in {f.name for f in fields(part.Config)} for part in self.parts
        )

    def has(self, setting: str) -> bool:
        """Whether one of the methods has a setting."""
        return any(f.name == setting for part in self.parts for f in fields(part.Config))

    def flags(self) -> list[str]:
        """Return settings under which two ways to compute an update can be compared.

        Refreshes come soon, nothing is dropped, and nothing is taken from the first micro-batch alone. A decomposition
        leaves the signs of its vectors to rounding: they are aligned with those before.
        """
        wanted = {"update_proj_gap": 3, "dropout": 0, "adapter_dropout": 0, "init": "random", "moments": "align"}
        return [
            f"--{part.name}-{f.name.replace('_', '-')}={wanted[f.name]}"
            for part in self.parts
            for f in fields(part.Config)
            if f.name in wanted
        ]

    def refusal(self, line: str) -> str | None:
        """Return why one of the methods refuses a flag of the line, as its class says."""
        return next(
            (why for part in self.parts for flag, why in part.refuses.items() if f"{flag} " in f"{line} "), None
        )


def found() -> list:
    """Return every method of every command that trains, and the pairs that compose; pairs are slow."""
    with toys_registered():
        subjects = []
        for command in ("pretrain", "finetune"):
            names = [n for n in methods.names() if command in methods.get(n).commands]
            for name in names:
                toy = (TOYS / f"{name}.py").is_file()
                subjects.append(
                    pytest.param(Subject(command, name, (methods.get(name),), toy), id=f"{command}-{name}")
                )
            for name in (f"{a}+{b}" for i, a in enumerate(names) for b in names[i + 1 :]):
                parts = composed(name, command)
                if parts:
                    pair = Subject(command, name, tuple(parts))
                    subjects.append(pytest.param(pair, id=str(pair), marks=pytest.mark.slow))
    return subjects


def composed(text: str, command: str) -> list[type[methods.Method]]:
    """Return the methods of `a+b`, or none if they do not combine."""
    try:
        parts = methods.compose(text, command)
        resolve(command, {"method": text, "model": "a/model"} if command == "finetune" else {"method": text}, {})
    except UsageError:
        return []
    return [] if any((TOYS / f"{part.name}.py").is_file() for part in parts) else parts


# modes of the loop and the optimizer, the same in every command: slow but for a method's first one
OF_THE_OPTIMIZER = {
    "test_in_backward",
    "test_other_rules",
    "test_8_bit_moments_follow_32",
    "test_16_bits_follow_64",
    "test_stochastic_rounding_follows_64_bits_in_the_mean",
    "test_estimate_is_what_the_optimizer_holds",
    "test_accumulation_of_ragged_rows",
    "test_per_layer",
    "test_resumed_in_the_middle_of_a_gap",
    "test_two_processes",
}


# where two methods can get into each other's way: the rest is each one's own
OF_PAIRS = {
    "test_learns",
    "test_accumulation_of_ragged_rows",
    "test_per_layer",
    "test_two_processes",
    "test_resumed_in_the_middle_of_a_gap",
    "test_what_is_written_computes_what_was_trained",
}


# where a batch of matrices could go another way than a matrix
OF_EXPERTS = {
    "test_accumulation_of_ragged_rows",
    "test_per_layer",
    "test_two_processes",
    "test_other_rules",
    "test_resumed_in_the_middle_of_a_gap",
    "test_estimate_is_what_the_optimizer_holds",
    "test_what_is_written_computes_what_was_trained",
}


def with_experts(subjects: list) -> list:
    """Return the methods that train whole models or adapters, on a mixture of experts."""
    single = [replace(p.values[0], experts=True) for p in subjects if len(p.values[0].parts) == 1]
    return [pytest.param(s, id=str(s)) for s in single if s.command == "pretrain" or s.adapts]


def pytest_generate_tests(metafunc):
    if "subject" in metafunc.fixturenames:
        subjects = found()
        if metafunc.function.__name__ in OF_EXPERTS:
            more = with_experts(subjects)
            # one mode of one method in every run of the suite, for what it has to do with the loop
            quick = metafunc.function.__name__ == "test_accumulation_of_ragged_rows"
            subjects += [*more[:quick], *map(slow, more[quick:])]
        if metafunc.function.__name__ not in OF_PAIRS:
            subjects = [param for param in subjects if len(param.values[0].parts) == 1]
        if metafunc.function.__name__ in OF_THE_OPTIMIZER:
            subjects = [slow(param) if repeated(param.values[0]) else param for param in subjects]
        metafunc.parametrize("subject", subjects)


def repeated(subject: Subject) -> bool:
    """Say whether the methods have another command before this one."""
    return subject.command == "finetune" and all("pretrain" in part.commands for part in subject.parts)


def slow(param):
    """Return a parameter of slow tests."""
    return pytest.param(*param.values, id=param.id, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def toys():
    with toys_registered():
        yield


@dataclass
class Trained:
    """What a run came to."""

    folder: Path
    start: dict[str, torch.Tensor]  # what trains, before the first update
    end: dict[str, torch.Tensor]  # and after the last one
    logits: torch.Tensor  # of the model in memory, before it was written
    metrics: list[dict]
    result: dict

    def values(self, key: str) -> list[float]:
        """Return the values that metrics.jsonl has of a key, in order."""
        return [line[key] for line in self.metrics if key in line]


@dataclass
class Runs:
    """Runs whose command lines were asked for already; each is trained once."""

    folder: Path
    numbers: Iterator[int] = field(default_factory=count)
    known: dict[str, Trained] = field(default_factory=dict)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    """Return a file of 60 instruction records of unlike lengths whose answers can be learned."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    words = [
        f"{a}{b}{c}" * (1 + i % 4)
        for i, (a, b, c) in enumerate((a, b, c) for a in "bdf" for b in "aeio" for c in "lmnrs")
    ]
    lines = [{"instruction": f"Spell {w} in capitals.", "input": "", "output": w.upper()} for w in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def experts_config(tmp_path_factory) -> Path:
    """Return the file of a mixture of three experts, of which a token takes two."""
    path = tmp_path_factory.mktemp("config") / "experts.json"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    path.write_text(json.dumps({"model_type": "mixtral", **sizes, **heads}))
    return path


@pytest.fixture(scope="session")
def trained_base(once, news, tiny_config) -> Path:
    """Return the folder of a tiny LLaMA that was trained for a moment."""
    from lowrank_cli.main import main

    def write(folder: Path) -> None:
        flags = ["--dataset", news, "--model-config", tiny_config, "--vocab-size", 512, "--max-length", 64]
        more = ["--no-plots", "--max-steps", 4, "--eval-tokens", 200, "--out", folder, "--quiet"]
        assert main(["pretrain", *map(str, [*flags, *more])]) == 0

    return once("contract-base", write) / "model"


@pytest.fixture(scope="session")
def experts_base(once, news, experts_config) -> Path:
    """Return the folder of a tiny mixture of experts that was trained for a moment."""
    from lowrank_cli.main import main

    def write(folder: Path) -> None:
        flags = ["--dataset", news, "--model-config", experts_config, "--vocab-size", 512, "--max-length", 64]
        more = ["--no-plots", "--max-steps", 4, "--eval-tokens", 200, "--out", folder, "--quiet"]
        assert main(["pretrain", *map(str, [*flags, *more])]) == 0

    return once("contract-experts", write) / "model"


@pytest.fixture(scope="session")
def compressed_base(once, trained_base) -> Path:
    """Return that model as `lowrank compress` leaves it."""
    from lowrank_cli.main import main

    def write(folder: Path) -> None:
        flags = ["--model", trained_base, "--eval-tokens", 0, "--max-length", 64, "--no-plots", "--out", folder, "-q"]
        for name in methods.names():
            if "allocation" in {f.name for f in fields(methods.get(name).Config)}:
                # every linear becomes one of low rank: whatever else wants to train one finds it
                flags += [f"--{name}-allocation", "uniform"]
        assert main(["compress", *map(str, flags)]) == 0

    return once("contract-compressed", write) / "model"


@pytest.fixture
def command_line(request, news, tiny_config, experts_config, records) -> Callable[..., list[str]]:
    """Return the arguments of a subject's run of a second."""

    def call(subject: Subject) -> list[str]:
        line = f"{subject.command} --method {subject.method} --no-plots --max-length 64 --eval-tokens 500"
        line += " --log-every 1 --eval-every 8 --save-every 8"
        # PEFT's forms of some adapters leave the experts, which are most of such a model
        line += " --allow-partial" if subject.experts and subject.adapts else ""
        if subject.command == "pretrain":
            config = experts_config if subject.experts else tiny_config
            more = ["--dataset", news, "--model-config", config, "--vocab-size", 512]
        else:
            kind = "compressed" if subject.compresses else "experts" if subject.experts else "trained"
            base = request.getfixturevalue(f"{kind}_base")
            more = [
                "--dataset",
                records,
                "--model",
                base,
                "--template",
                "plain",
                "--no-keep-best",
                "--grad-clipping",
                0,
            ]
        return [*line.split(), *map(str, more), *subject.flags()]

    return call


@pytest.fixture
def train(lowrank, command_line, runs, monkeypatch):
    """Train a subject with the flags of a line; in float64 unless `exact` is False. Equal lines are trained once."""

    def call(subject: Subject, line: str, *, exact: bool = True) -> Trained:
        key = f"{subject} {line} {exact}"
        if key not in runs.known:
            with monkeypatch.context() as patch:
                if exact:
                    double.use_double(patch.setattr)
                runs.known[key] = run(patch, key, [*command_line(subject), *line.split()])
        return runs.known[key]

    def run(patch, key: str, argv: list[str]) -> Trained:
        folder, seen = runs.folder / str(next(runs.numbers)), {}
        watch(patch.setattr, seen)
        code, out, err = lowrank("", *argv, "--out", folder, "--json")
        assert code == 0, f"{key}: {err}"
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Trained(folder, **seen, metrics=metrics, result=json.loads(out))

    return call
