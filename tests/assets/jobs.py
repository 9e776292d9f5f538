"""Every job on a tiny model of each family, through the commands: what docs/models.md says, and how it is written.

python tests/assets/jobs.py     # writes the table anew
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from made_text import articles
from tiny_models import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from watched import SEEN, setter, watch

from lowrank_cli import console
from lowrank_cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- written by tests/assets/jobs.py -->\n", "<!-- end -->\n"
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "cohere2", "olmo3", "glm4",
    "smollm3",
    "gpt2", "gpt_neox", "opt", "bloom", "falcon",
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "olmoe",
    "qwen3_next", "mamba", "mamba2", "bamba", "falcon_h1", "lfm2", "jamba",
)  # fmt: skip
TRAINING = "--max-steps 2 --max-length 32 --batch-size 4 --eval-tokens 100 --no-plots --dataset t.jsonl --lr 0.01 -q"
COMPRESSING = "--welore-param-budget 0.8 --eval-tokens 0 --welore-weighting none --no-plots -q"
JOBS = {
    "pretrain, galore": f"pretrain --method galore --continue-from model --out out {TRAINING}",
    "finetune, lora --merge": f"finetune --merge --no-keep-best --task text --model model --out out {TRAINING}",
    "compress": f"compress --model model --out out {COMPRESSING}",
    "svd-dump": "svd-dump --model model --out out --no-plots -q",
    "eval ppl": "eval ppl --model model --dataset t.jsonl --window 16 --max-tokens 60 -q",
}
# roundings of 24 bits, 1e-7 each, of some dozens of products in a row
SAME = 1e-5


def write_model(kind: str, folder: Path, tokenizer: Path) -> None:
    """Write a tiny model of a family with a tokenizer, and some entries that it has no words for."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind] | {"vocab_size": len(words) + 8})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(words, name) if getattr(words, name) is not None else 0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)


def outcome(job: str) -> str:
    """Run a job in the current folder, which has `model` and `t.jsonl`.

    Returns:
        "yes" if it did, and what it wrote gives the logits that it should; else the sentence that it said. A run that
        stops because it would reach too little of the layers is run once more as it asks for.
    """
    found = attempt(JOBS[job], job)
    if " acts on only " in found:
        share = found.partition(" acts on only ")[2].partition(" of ")[0]
        found = f"{attempt(f'{JOBS[job]} --allow-partial', job)}, {share} of the layers with `--allow-partial`"
    return found


def attempt(line: str, job: str) -> str:
    """Run a line of a job once."""
    seen: dict = {}
    said = io.StringIO()
    with ExitStack() as undo, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        watch(setter(undo), seen)
        code = main(shlex.split(line))
        console.set_level(console.NORMAL)
        console.log_to(None)
        if code == 0 and job == "compress":
            code = main(shlex.split("compress --model out --format dense --out dense -q --no-plots"))
    if code != 0:
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        return errors[0].removeprefix("error: ") if errors else f"exit {code}: {said.getvalue()[-300:]}"
    wanted = seen.get("logits")
    if job == "compress":
        wanted = logits("dense")
    if wanted is None:
        return "yes"
    found = logits("out")
    return "yes" if (found - wanted.double()).abs().max() < SAME * wanted.abs().max() else "other logits"


@torch.no_grad()
def logits(run: str) -> torch.Tensor:
    """Return what the model of a run gives, loaded by Transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(f"{run}/model", dtype=torch.float32).eval()
    return model(SEEN, use_cache=False).logits.double()


def outcomes(kind: str, tokenizer: Path) -> dict[str, str]:
    """Return the outcome of every job on a family, each in a folder of its own."""
    found, before = {}, Path.cwd()
    for job in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                Path("t.jsonl").write_text("".join(json.dumps(a) + "\n" for a in articles(30, "news")))
                write_model(kind, Path("model"), tokenizer)
                found[job] = outcome(job)
            finally:
                os.chdir(before)
    return found


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return outcomes as a table of Markdown."""
    lines = [["model type", *JOBS], ["---"] * (len(JOBS) + 1)]
    lines += [[f"`{kind}`", *(rows[kind][job] for job in JOBS)] for kind in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def on_page() -> dict[str, dict[str, str]]:
    """Return the outcomes that the page has."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines()]
    return {row[0].strip("`"): dict(zip(JOBS, row[1:], strict=True)) for row in cells[2:]}


if __name__ == "__main__":
    import made_model

    place = Path(tempfile.mkdtemp()) / "stories"
    made_model.write(place)
    rows = {}
    for kind in FAMILIES:
        rows[kind] = outcomes(kind, place)
        print(kind, rows[kind], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}{table(rows)}{END}{rest.partition(END)[2]}", encoding="utf-8")
