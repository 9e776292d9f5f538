"""WeLore: which weights become low-rank, and that fine-tuning trains those and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_cli import methods
from lowrank_cli.config import resolve
from lowrank_cli.errors import UsageError
from lowrank_cli.models.lowrank_linear import low_rank_linears


@pytest.fixture
def compressed(lowrank, stories) -> Path:
    code, _, err = lowrank(
        "compress --welore-rank 50 --eval-tokens 0 --welore-weighting none --no-plots --out small --model", stories
    )
    assert code == 0, err
    return Path("small/model")


@pytest.fixture
def finetune(lowrank, news):
    """Fine-tune a model on news for a few updates, and return what was said."""

    def call(line: str, model: Path, code: int = 0) -> str:
        always = "finetune --task text --max-length 64 --batch-size 4 --eval-tokens 500 --lr 0.01 --no-plots --out run"
        found, _, err = lowrank(f"{always} {line}", "--dataset", news, "--model", model)
        assert found == code, err
        return err

    return call


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": 50, "param_budget": 0.8}, "both say how much"),
        ({"paper": True}, "needs a rank reduction"),
        ({"paper": True, "rank": 50, "pifa": True}, "not in the paper"),
        ({"paper": True, "param_budget": 0.5}, "not in the paper"),
        ({"weighting": "none", "calibrate": "stdlib"}, "uses no text"),
        ({"weighting": "none", "samples": 4}, "there is none"),
        ({"paper": True, "rank": 50, "calibrate": "stdlib"}, "not in the paper"),
        ({"paper": True, "rank": 50, "weighting": "input"}, "not in the paper"),
        ({"paper": True, "rank": 50, "allocation": "uniform"}, "not in the paper"),
        ({"min_ratio": 0.3}, "this one is budget"),
        ({"rank": 50, "allocation": "energy", "min_ratio": 0.3}, "this one is energy"),
        ({"train_norms": True}, "a setting of lowrank finetune"),
        ({"counting": "all", "param_budget": 0.5}, "with a rank"),
        ({"counting": "all", "rank": 50, "allocation": "uniform"}, "with a rank"),
        ({"rank": 0}, "larger than 0"),
        ({"rank": 100}, "smaller than 100"),
        ({"param_budget": 1.5}, "at most 1"),
    ],
)
def test_refuses_settings_that_do_not_go_together(flags, message):
    with pytest.raises(UsageError) as raised:
        resolve("compress", {"method": "welore"}, {"welore": flags})
    assert message in f"{raised.value.message}; {raised.value.hint}"


@pytest.mark.parametrize("name", ["rank", "pifa", "calibrate", "min_ratio"])
def test_finetune_refuses_settings_of_a_compression(name):
    given = {"rank": 30, "pifa": True, "calibrate": "stdlib", "min_ratio": 0.2}
    with pytest.raises(UsageError, match=f"--welore-{name.replace('_', '-')} is a setting of lowrank compress"):
        resolve("finetune", {"method": "welore"}, {"welore": {name: given[name]}})


def test_a_file_may_hold_settings_of_both_commands_and_old_defaults(tmp_path):
    """A run's own config.yaml has every setting, at the defaults of its day."""
    file = tmp_path / "both.yaml"
    file.write_text("method: welore\nwelore:\n  rank: 50\n  damping: 0.5\n  train_norms: true\n  weighting: none\n")
    for command in ("compress", "finetune"):
        found = resolve(command, {"model": "somewhere"}, {}, config_file=str(file)).methods["welore"]
        assert (found.rank, found.damping, found.train_norms) == (50, 0.5, True)


def test_a_dense_model_has_nothing_to_train(finetune, stories):
    assert "compress it first" in finetune("--method welore --max-steps 1", stories, code=2)


@pytest.mark.parametrize("norms", [False, True])
def test_trains_the_low_rank_components_only(norms, finetune, compressed):
    finetune(f"--method welore --max-steps 3 {'--welore-train-norms' if norms else ''}", compressed)
    before, after = tensors_of(compressed), tensors_of("run/model")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {name for name in before if name.endswith((".A.weight", ".B.weight"))}
    assert factors
    assert moved == factors | ({n for n in before if "norm" in n} if norms else set())
    assert low_rank_linears(AutoModelForCausalLM.from_pretrained("run/model"))
    rows = {row["name"]: row["role"] for row in json.loads(Path("run/targets.json").read_text())}
    assert {n for n, role in rows.items() if role == "welore"} == factors


@pytest.mark.parametrize(
    "line",
    [
        "--method welore+galore --galore-rank 2",
        "--method welore+velora --velora-layers qd",
        "--method welore+velora --velora-layers '*_proj'",
    ],
)
def test_combines_with(line, finetune, compressed):
    finetune(f"{line} --max-steps 2", compressed)
    before, after = tensors_of(compressed), tensors_of("run/model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.endswith((".A.weight", ".B.weight")) for name in moved)
    roles = {row["role"] for row in json.loads(Path("run/targets.json").read_text())}
    assert line.split()[1].partition("+")[2] in roles


def test_describes_what_it_aims_at():
    from lowrank_cli.svd.spectrum import DAMPING

    assert methods.get("welore").Config().damping == DAMPING
    method = methods.get("welore")
    assert method(method.Config(rank=50)).target == "50 % of the singular values cut"
    assert method(method.Config()).target == "80 % of the matrices' parameters kept"
    assert method(method.Config(rank=50)).allocation == "welore"
    assert method(method.Config(param_budget=0.6)).allocation == "budget"
