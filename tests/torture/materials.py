"""What all cases read: made data, a tiny model in every form that the commands take, and runs to damage."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import children
import made_text

TINY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 88,
        "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": 512,
        "rms_norm_eps": 1e-6}  # fmt: skip
# two refreshes within the updates
GAP = 5
COMMON = "--max-length 32 --batch-size 4 --eval-tokens 200 --log-every 1 --no-plots --kernel torch"
UPDATES = "--max-steps 24 --save-every 3 --eval-every 6"
MODES = {
    "plain": "",
    "per layer": "--per-layer",
    "8-bit": "--optimizer adamw8bit",
    "bfloat16, stochastic rounding": "--dtype bfloat16 --stochastic-rounding",
    "accumulation": "--total-batch-size 8",
    "two processes": "",
}


@dataclass
class Materials:
    """The files."""

    root: Path

    @property
    def news(self) -> Path:
        return self.root / "news.jsonl"

    @property
    def records(self) -> Path:
        return self.root / "records.jsonl"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def config(self) -> Path:
        return self.root / "tiny.json"

    @property
    def model(self) -> Path:
        """A plain model."""
        return self.root / "run" / "model"

    @property
    def run(self) -> Path:
        """A training run that was stopped between two checkpoints and its end."""
        return self.root / "stopped"

    @property
    def sharded(self) -> Path:
        """The same of two processes, each with its share."""
        return self.root / "sharded"

    @property
    def compressed(self) -> Path:
        return self.root / "small" / "model"

    @property
    def adapter(self) -> Path:
        return self.root / "tuned" / "model"

    def base_line(self, method: str, out: str = "run") -> list[str]:
        """Return a pretraining of a method."""
        own = f"--method {method} {own_flags(method)} {COMMON} --out {out}"
        return f"pretrain {own} --dataset {self.news} --model-config {self.config} --vocab-size 512".split()

    def tune_line(self, method: str, out: str = "run") -> list[str]:
        """Return a fine-tuning of a method, with the best weights kept."""
        from lowrank_cli import methods

        low_rank = "compress" in methods.get(method).commands
        model = self.compressed if low_rank else self.model
        own = f"--method {method} {own_flags(method)} {COMMON} --out {out}"
        return f"finetune {own} --dataset {self.records} --model {model} --template plain".split()

    def training_line(self, command: str, method: str) -> list[str]:
        """Return a training that takes about a second."""
        line = self.base_line(method) if command == "pretrain" else self.tune_line(method)
        return [*line, *UPDATES.split()]


def own_flags(method: str) -> str:
    """Return the flags that make a method refresh what it has within a tiny run."""
    from lowrank_cli import methods

    return " ".join(
        f"--{part}-update-proj-gap {GAP}"
        for part in method.split("+")
        if any(f.name == "update_proj_gap" for f in fields(methods.get(part).Config))
    )


def subjects() -> list[tuple[str, str]]:
    """Return every command that trains with each of its methods."""
    from lowrank_cli import methods

    return [(c, n) for c in ("pretrain", "finetune") for n in methods.names() if c in methods.get(n).commands]


def cut_short() -> None:
    """Interrupt the training of this process after its eighth update."""
    import os
    import signal

    from lowrank_cli.train import loop

    original = loop.Session.mark

    def marked(session) -> None:
        original(session)
        if session.progress.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.Session.mark = marked


def write(root: Path) -> Materials:
    """Write everything; what the command needs is imported here afterwards."""
    made = Materials(root)
    draw = made_text.Draw("torture")
    lines = [json.dumps(a) + "\n" for a in made_text.articles(120, "torture")]
    made.news.write_text("".join(lines), encoding="utf-8")
    made.text.write_text("\n\n".join(json.loads(line)["text"] for line in lines[:10]), encoding="utf-8")
    asked = "Who {verb} the {thing} of {town}?"
    records = [{"instruction": draw.fill(asked), "input": "", "output": draw.fill("{person}")} for _ in range(80)]
    made.records.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    made.config.write_text(json.dumps(TINY))
    short = ["--max-steps", "4", "--save-every", "2"]
    lines = [
        [*made.base_line("full"), *short],
        f"compress --model {root}/run --eval-tokens 200 --max-length 32 --out small".split(),
        [*made.tune_line("lora", "tuned"), *short],
        f"svd-dump --model {root}/run --out values".split(),
        f"eval ppl --model {made.model} --dataset {made.text} --window 64 --out scores".split(),
    ]
    for line in lines:
        settled(children.learn(line, root), 0)
    # lm-eval's tasks are listed once for each version of it
    settled(children.learn(["eval", "no_such_task", "--model", str(made.model)], root), 2)
    line = [*made.base_line("galore", "stopped"), *UPDATES.split()]
    settled(children.run(line, root, before=cut_short), 130)
    line = [*made.base_line("galore", "sharded"), *UPDATES.split(), "--parallel", "fsdp"]
    settled(children.run(line, root, before=cut_short, ranks=2), 130)
    children.freeze()
    return made


def settled(outcome: children.Outcome, code: int) -> None:
    """Stop the campaign if a material could not be made."""
    if outcome.code != code:
        raise SystemExit(f"a material could not be made\n{outcome.text()}")
