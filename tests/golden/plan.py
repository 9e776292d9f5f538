"""The command lines that are run in two trees, made from what both have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import made_text

CONFIG = {"model_type": "llama", "architectures": ["LLaMAForCausalLM"], "hidden_size": 32, "intermediate_size": 88,
          "num_attention_heads": 2, "num_hidden_layers": 2, "max_sequence_length": 128, "vocab_size": 32000,
          "pad_token_id": -1, "rms_norm_eps": 1e-6}  # fmt: skip
# beside every subject's flags; a refresh happens twice within the updates
UPDATES = "--max-steps 20 --batch-size 4 --save-every 1000"
OPTIONS = {"update-proj-gap": "7", "save-only-topk": None}
MODES = {
    "plain": "--max-steps 20 --batch-size 4 --save-every 10 --keep 9",
    "accumulation": "--max-steps 20 --batch-size 1 --total-batch-size 4 --save-every 1000",
    "per layer": f"{UPDATES} --per-layer",
    "checkpointing": f"{UPDATES} --activation-checkpointing",
    "bfloat16": f"{UPDATES} --dtype bfloat16",
    "stochastic rounding": f"{UPDATES} --dtype bfloat16 --stochastic-rounding",
    "adamw8bit": f"{UPDATES} --optimizer adamw8bit",
    "adafactor": f"{UPDATES} --optimizer adafactor",
    "clipping": f"{UPDATES} --grad-clipping 0.5",
}
TWO_PROCESSES = "--max-steps 8 --batch-size 1 --total-batch-size 4 --save-every 1000"
QUICK = ("base", "plain", "accumulation", "resume", "help", "presets")


@dataclass(frozen=True)
class Line:
    """A command line; what it has printed is compared if it is of a kind that trains nothing."""

    group: str
    name: str
    text: str
    ranks: int = 1

    @property
    def prints(self) -> bool:
        """Whether its stdout is what is compared."""
        return self.group in ("help", "presets", "estimate")


@dataclass(frozen=True)
class Files:
    """What all runs read."""

    news: Path
    records: Path
    config: Path
    base: Path
    compressed: Path

    @classmethod
    def write(cls, folder: Path, base: Path, compressed: Path) -> Files:
        """Write data and a model's configuration; `base` and `compressed` are models that the first runs leave."""
        files = cls(folder / "news.jsonl", folder / "records.jsonl", folder / "tiny.json", base, compressed)
        draw = made_text.Draw("golden")
        records = [
            {
                "instruction": draw.fill("Who {verb} the {thing} of {town}?"),
                "input": "",
                "output": draw.fill("{person}"),
            }
            for _ in range(120)
        ]
        for path, lines in ((files.news, made_text.articles(120, "golden")), (files.records, records)):
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        files.config.write_text(json.dumps(CONFIG), encoding="utf-8")
        return files


@dataclass(frozen=True)
class Subject:
    """A method, or two, in a command that trains, with the flags that it has in every mode."""

    command: str
    method: str
    flags: str

    def line(self, group: str, more: str, variant: str = "", ranks: int = 1) -> Line:
        """Return a run in a mode."""
        name = f"{self.command} {self.method}{variant and ' '}{variant}"
        return Line(group, name, f"{self.command} --method {self.method} {self.flags} {more}", ranks)


def subjects(both: dict, files: Files) -> Iterator[Subject]:
    """Yield every method in every command that trains, then the pairs."""
    for command in ("pretrain", "finetune"):
        single = [name for name, commands in both["methods"].items() if command in commands]
        for method in [*single, *(pair for c, pair in both["pairs"] if c == command)]:
            parts = method.split("+")
            flags = [
                f"--{part}-{option} {value}" if value else f"--no-{part}-{option}"
                for part in parts
                for option, value in OPTIONS.items()
                if f"--{part}-{option}" in both["options"]
            ]
            if command == "pretrain":
                flags.append(f"--dataset {files.news} --model-config {files.config} --vocab-size 512")
            else:
                low_rank = any("compress" in both["methods"][part] for part in parts)
                model = files.compressed if low_rank else files.base
                flags.append(f"--dataset {files.records} --model {model} --template plain --no-keep-best")
            flags.append("--max-length 64 --eval-tokens 500 --eval-every 10 --log-every 1 --no-plots --kernel torch")
            yield Subject(command, method, " ".join([*flags, "--out run"]))


def base_lines(files: Files) -> list[Line]:
    """Return the runs that make the models which others begin with."""
    more = "--max-length 64 --eval-tokens 500 --no-plots --out run"
    pretrain = f"pretrain --method full --dataset {files.news} --model-config {files.config} --vocab-size 512 {more}"
    compress = f"compress --model {files.base} {more} --welore-param-budget 0.6 --welore-allocation uniform"
    return [
        Line("base", "pretrain", f"{pretrain} --max-steps 20 --batch-size 4 --log-every 1 --kernel torch"),
        Line("base", "compress", compress),
    ]


def lines(both: dict, files: Files) -> Iterator[Line]:
    """Yield every command line after the first ones, group by group."""
    every = list(subjects(both, files))
    single = [s for s in every if "+" not in s.method]
    for group, mode in MODES.items():
        yield from (subject.line(group, mode) for subject in every)
    for subject in every:
        for flag in own(subject, both, "in-backward"):
            yield subject.line("in backward", f"{UPDATES} {flag}", flag)
            off = flag.replace("--", "--no-", 1)
            yield subject.line("in backward", f"{UPDATES} {off}", off)
    for subject in single:
        yield from (subject.line("options", f"{UPDATES} {flag}", flag) for flag in settings(subject, both))
    for how in ("ddp", "fsdp"):
        yield from (subject.line(how, f"{TWO_PROCESSES} --parallel {how}", ranks=2) for subject in single)
    for subject in single[:2]:
        yield subject.line("nproc", f"{TWO_PROCESSES} --nproc 2")
    yield from (subject.line("estimate", "--dry-run --json") for subject in every)
    yield Line("help", "lowrank", "--help")
    for command in both["commands"]:
        yield Line("help", command, f"{command} --help")
        of_command = [name for name, commands in both["methods"].items() if command in commands]
        yield from (Line("help", f"{command} {m}", f"{command} --method {m} --help") for m in of_command)
    for preset, command in both["presets"].items():
        yield Line("presets", preset, f"{command} --preset {preset} --print-config")


def own(subject: Subject, both: dict, ending: str = "") -> list[str]:
    """Return the flags of a subject's methods, all or those that end so."""
    starts = tuple(f"--{part}-" for part in subject.method.split("+"))
    return [flag for flag in both["options"] if flag.startswith(starts) and flag.endswith(ending)]


def settings(subject: Subject, both: dict) -> Iterator[str]:
    """Yield every choice of every option that is not the default, and every switch the other way round."""
    for flag in own(subject, both):
        choices, default = both["options"][flag].values()
        if isinstance(default, bool) and not flag.endswith(("in-backward", *OPTIONS)):
            yield flag.replace("--", "--no-", 1) if default else flag
        yield from (f"{flag} {choice}" for choice in choices if choice != default)
