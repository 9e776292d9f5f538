"""Perplexity of a model compressed in every way, at equal parameters and at equal rank reductions.

    python tests/bench/compression_table.py --model DIR --calibrate TRAIN.txt --test TEST.txt --out DIR [--cells ...]

One line of JSON a cell in OUT/cells.jsonl; what is there already is not measured again, so that it can be stopped and
started at will. The second moments of the calibration text are kept in OUT/moments-*.safetensors.

The protocol: the lines of the test text joined with an empty line between them, tokenized as a whole, windows of 512
tokens, 30,000 tokens; each window is predicted from its own first token on. Float32 on the CPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_cli import console
from lowrank_cli.compress.own_text import own_windows
from lowrank_cli.compress.text import OWN, windows
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.models.load import load_weights
from lowrank_cli.models.lowrank_linear import shape_of, weight_of
from lowrank_cli.models.source import place
from lowrank_cli.models.targets import select
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.svd import calibration, rank_selection
from lowrank_cli.svd.spectrum import DAMPING, Decomposition, decompose

BUDGETS = (0.6, 0.8, 0.9, 0.7)
REDUCTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# row: (weighting, pifa, rule); the rule gets the plain spectra, the weighted ones and the target
BUDGET_ROWS = {
    "ours, pifa": ("two-sided", True, lambda plain, own, x: rank_selection.cheapest(own, x)),
    "ours": ("two-sided", False, lambda plain, own, x: rank_selection.cheapest(own, x)),
    "two-sided, uniform": ("two-sided", False, lambda plain, own, x: rank_selection.uniform_for_parameters(plain, x)),
    "SVD-LLM (whitened, uniform)": (
        "input",
        False,
        lambda plain, own, x: rank_selection.uniform_for_parameters(plain, x),
    ),
    "WeLore 0.5, whitened": (
        "input",
        False,
        lambda plain, own, x: rank_selection.welore_for_parameters(plain, x, min_ratio=0.5),
    ),
    "WeLore as published, 0.5": (
        "none",
        False,
        lambda plain, own, x: rank_selection.welore_for_parameters(plain, x, min_ratio=0.5),
    ),
    "uniform": ("none", False, lambda plain, own, x: rank_selection.uniform_for_parameters(plain, x)),
}
REDUCTION_ROWS = {
    "WeLore 0.5, two-sided": ("two-sided", False, lambda plain, own, x: rank_selection.welore(plain, x)),
    "WeLore 0.5, whitened": ("input", False, lambda plain, own, x: rank_selection.welore(plain, x)),
    "WeLore as published, 0.5": ("none", False, lambda plain, own, x: rank_selection.welore(plain, x, paper=True)),
    "uniform": ("none", False, lambda plain, own, x: rank_selection.uniform(plain, x)),
}


class Table:
    """The model, its decompositions, and the cells."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        given.out.mkdir(parents=True, exist_ok=True)
        self.cells = given.out / "cells.jsonl"
        source = place(str(given.model), offline=True)
        self.model = load_weights(source, torch.float32).eval()
        self.tokenizer = named_tokenizer(source.name, offline=True)
        self.linears = select(self.model, None)
        self.weights = {name: weight_of(m).detach().clone() for name, m in self.linears.items()}
        self.shapes = {name: shape_of(m) for name, m in self.linears.items()}
        self.found: dict[str, dict[str, Decomposition]] = {}
        self.calibration = "+".join(path.name for path in given.calibrate)

    def tokens(self, path: Path) -> Tensor:
        """The ids of a text."""
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            text = file.read(self.given.characters)
        if path.suffixes[-2:-1] == [".json"] or path.suffix in (".json", ".jsonl"):
            text = "\n".join(json.loads(line)["text"] for line in text.split("\n")[:-1] if line)
        return torch.tensor(self.tokenizer("\n\n".join(text.split("\n")), add_special_tokens=False).input_ids)

    def decompositions(self, weighting: str) -> dict[str, Decomposition]:
        """Every linear's decomposition, made when first asked for."""
        if weighting not in self.found:
            moments = {} if weighting == "none" else self.moments()
            console.note(f"decomposing, {weighting}")
            self.found[weighting] = {
                name: decompose(
                    weight,
                    moments.get(f"{name}|input"),
                    moments.get(f"{name}|output") if weighting == "two-sided" else None,
                    damping=self.given.damping,
                )
                for name, weight in self.weights.items()
            }
        return self.found[weighting]

    def moments(self) -> dict[str, Tensor]:
        """The second moments on the calibration text, from the file if it is there."""
        path = self.given.out / f"moments-{self.calibration}-{self.given.windows}.safetensors"
        if not path.is_file():
            share = self.given.windows // len(self.given.calibrate)
            windows = [window for text in self.given.calibrate for window in self.windows(text, share)]
            console.note(f"calibrating on {len(windows)} windows")
            found = calibration.collect(self.model, self.linears, windows, two_sided=True)
            tensors = {f"{name}|input": m.input.clone() for name, m in found.items()}
            save_file(tensors | {f"{name}|output": m.output for name, m in found.items()}, path)
        return load_file(path)

    def windows(self, text: Path, count: int) -> list[Tensor]:
        """The windows of a calibration text, (1, 512) each."""
        if text.name == OWN:
            rows = own_windows(self.model, length=512, count=count, seed=0, flag="--calibrate")
            return [row[None] for row in rows]
        if not text.exists():
            given = {"length": 512, "count": count, "offline": True, "flag": "--calibrate", "whole": False}
            return [row[None] for row in windows(DataConfig(dataset=str(text)), "train", self.tokenizer, **given)]
        return list(calibration.windows_of(self.tokens(text), 512, count))

    @torch.no_grad()
    def perplexity(self) -> float:
        """Of the model as it is now."""
        total, tokens = 0.0, 0
        count = math.ceil(self.given.tokens / 511)
        for window in calibration.windows_of(self.tokens(self.given.test), 512, count):
            logits = self.model(input_ids=window, use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            tokens += 511
        return math.exp(min(total / tokens, 700))

    @torch.no_grad()
    def put(self, ranks: rank_selection.Ranks, found: dict[str, Decomposition]) -> None:
        """The product of the factors in the place of every weight: what the factored model computes."""
        for name, module in self.linears.items():
            weight = self.weights[name]
            if ranks[name] is not None:
                first, second = found[name].factors(weight, ranks[name])
                weight = first @ second
            put_weight(module, weight)

    def cell(self, row: str, kind: str, target: float, how: tuple) -> None:
        """Measure a cell and append its line."""
        key = {"row": row, kind: target, "calibration": self.calibration, "windows": self.given.windows,
               "test": self.given.test.name, "tokens": self.given.tokens, "damping": self.given.damping}  # fmt: skip
        if any(key.items() <= json.loads(line).items() for line in self.lines()):
            return
        start = time.perf_counter()
        weighting, pifa, rule = how
        found = self.decompositions(weighting)
        form = {"shapes": self.shapes, "pifa": pifa, "allow_growth": "published" in row}
        own = rank_selection.Spectra({n: d.values for n, d in found.items()}, **form)
        # the uniform rules look at shapes only
        unweighted = self.decompositions("none") if "WeLore" in row else found
        plain = rank_selection.Spectra({n: d.values for n, d in unweighted.items()}, **form)
        ranks = rule(plain, own, target)
        self.put(ranks, found)
        entry = key | {
            "perplexity": self.perplexity(),
            "parameter_share": plain.parameter_share(ranks),
            "rank_reduction": plain.rank_reduction(ranks),
            "factored": sum(r is not None for r in ranks.values()),
            "seconds": round(time.perf_counter() - start, 1),
        }
        self.append(entry)

    def dense(self) -> None:
        """The cell of the model itself."""
        key = {"row": "dense", "test": self.given.test.name, "tokens": self.given.tokens}
        if not any(key.items() <= json.loads(line).items() for line in self.lines()):
            self.put(dict.fromkeys(self.linears), {})
            self.append(key | {"perplexity": self.perplexity()})

    def lines(self) -> list[str]:
        """The cells that are there."""
        return self.cells.read_text(encoding="utf-8").splitlines() if self.cells.is_file() else []

    def append(self, entry: dict) -> None:
        """One more cell."""
        with self.cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


def put_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy an (out, in) weight into a linear or a Conv1D."""
    module.weight.copy_(weight if hasattr(module, "out_features") else weight.mT)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        required=True,
        help=".txt, .gz of text, .json(.gz) lines, stdlib, or self, which the model writes; in equal parts",
    )
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, to calibrate on")
    parser.add_argument("--damping", type=float, default=DAMPING, help="of the moments")
    parser.add_argument("--tokens", type=int, default=30_000, help="to measure on")
    parser.add_argument("--characters", type=int, default=3_000_000, help="read of each text")
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--reductions", nargs="*", type=float, default=REDUCTIONS)
    given = parser.parse_args()
    console.quiet_libraries()
    table = Table(given)
    table.dense()
    for kind, rows, targets in (
        ("parameters", BUDGET_ROWS, given.budgets),
        ("reduction", REDUCTION_ROWS, given.reductions),
    ):
        for row, how in rows.items():
            if given.rows and row not in given.rows:
                continue
            for target in targets:
                table.cell(row, kind, target, how)


if __name__ == "__main__":
    main()
