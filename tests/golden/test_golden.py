"""Losses of every method on this machine and on those where tests/golden/losses.txt was written, to four digits."""

import json
import os
from pathlib import Path

import pytest

from lowrank_cli import methods

FILE = Path(__file__).with_name("losses.txt")
SUBJECTS = [(c, n) for c in ("pretrain", "finetune") for n in methods.names() if c in methods.get(n).commands]
# an eps above the rounding of gradients keeps Adam from blowing it up: losses differ by 1e-6 between processors
LINE = "--max-steps 20 --batch-size 4 --lr 1e-3 --eps 1e-4 --max-length 64 --eval-tokens 100 --log-every 1 --no-plots"


@pytest.fixture(scope="module")
def models(tmp_path_factory, news, tiny_config) -> dict[bool, Path]:
    """Return a tiny trained model, and that model compressed."""
    from lowrank_cli.main import main

    folder = tmp_path_factory.mktemp("models")
    pretrain = f"pretrain {LINE} --vocab-size 512 -q --out {folder}/base --dataset {news} --model-config {tiny_config}"
    compress = f"compress --eval-tokens 0 --max-length 64 --no-plots -q --model {folder}/base --out {folder}/small"
    assert main(pretrain.split()) == 0
    assert main(compress.split()) == 0
    return {False: folder / "base" / "model", True: folder / "small" / "model"}


@pytest.mark.numerical
@pytest.mark.parametrize(("command", "name"), SUBJECTS)
def test_losses_are_those_of_other_machines(command, name, lowrank, news, tiny_config, models):
    flags = {"pretrain": ["--model-config", tiny_config, "--vocab-size", 512], "finetune": ["--task", "text"]}[command]
    if command == "finetune":
        flags += ["--model", models["compress" in methods.get(name).commands]]
    code, _, err = lowrank(f"{command} --method {name} {LINE} --out run", "--dataset", news, *flags)
    assert code == 0, err
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    found = [float(f"{line['loss']:.4g}") for line in lines if "loss" in line]
    written = dict(line.split(": ") for line in FILE.read_text().splitlines()) if FILE.is_file() else {}
    if os.environ.get("GOLDEN_WRITE"):
        written[f"{command} {name}"] = " ".join(f"{loss:.4g}" for loss in found)
        FILE.write_text("".join(f"{key}: {losses}\n" for key, losses in sorted(written.items())))
        return
    # one unit of the last of four digits
    assert found == pytest.approx([float(loss) for loss in written[f"{command} {name}"].split()], abs=1.001e-3)
