"""--dry-run and --memory-budget as a user meets them, and a process's share under FSDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_cli import memory
from lowrank_cli.errors import PreflightError
from lowrank_cli.memory import tracker
from lowrank_cli.memory.estimate import sharded
from lowrank_cli.train import dry
from lowrank_cli.train.dry import Description


def test_a_dry_run_adds_up_and_says_when_the_peak_is(lowrank):
    code, out, err = lowrank("pretrain --method galore --dry-run --json")
    assert code == 0, err
    found = json.loads(out)
    assert sum(found["at_peak"].values()) == found["total_bytes"]
    largest = max(size for row in found["by_update"].values() for size in row.values())
    assert largest == found["total_bytes"]
    assert found["peak_in"] in err
    assert not Path("runs").exists()


def test_finetune_has_a_dry_run_from_the_configuration_alone(lowrank, base):
    Path("shape").mkdir()
    Path("shape/config.json").write_text(Path(base, "config.json").read_text())
    found = []
    for quantize in ("", "--quantize nf4"):
        code, out, err = lowrank(f"finetune --model shape --dataset nowhere.jsonl --dry-run --json {quantize}")
        assert code == 0, err
        found.append(json.loads(out))
    # the 401,408 elements of the layers' linears go from 4 bytes to half of one and its scales
    saved = found[0]["weights_bytes"] - found[1]["weights_bytes"]
    assert saved == pytest.approx(401_408 * (4 - 0.5 - 1 / 64), rel=0.02)
    assert found[0]["optimizer_states_bytes"] == found[1]["optimizer_states_bytes"]


def test_a_budget_that_is_too_small_names_what_fits(lowrank, tiny_config):
    line = f"pretrain --model-config {tiny_config} --vocab-size 512 --batch-size 8 --memory-budget 3MB"
    code, out, err = lowrank(line)
    assert (code, out) == (3, "")
    error, _, hint = err.partition("hint: ")
    assert "over the budget of 3.0 MiB" in error
    knobs = hint.partition(" with: ")[2].strip()
    assert knobs.startswith("--batch-size")
    assert not Path("runs").exists()
    code, out, err = lowrank(f"{line} {knobs} --dry-run --json")
    assert code == 0, err
    assert json.loads(out)["total_bytes"] <= 3 * 2**20


def size(config) -> int:
    """A stand-in for an estimate, in which every knob has its part."""
    parts = [
        config.train.batch_size * (1 if config.model.activation_checkpointing else 2),
        8 if config.model.dtype == "float32" else 4,
        8 if config.optim.optimizer == "adamw" else 2,
        0 if config.optim.per_layer else 8,
        0 if "galore" in config.method else 1,
    ]
    return 2**20 * sum(parts)


def test_cheap_knobs_come_first_and_end_when_it_fits(pretraining, capsys):
    config = pretraining(batch_size=8, dtype="float32")
    for budget, wanted in [
        (33, "--per-layer"),
        (30, "--per-layer --batch-size 4 --total-batch-size 8"),
        (20, "--per-layer --batch-size 1 --total-batch-size 8"),
        (16, "--per-layer --batch-size 1 --total-batch-size 8 --activation-checkpointing --optimizer adamw8bit"),
    ]:
        with pytest.raises(PreflightError) as caught:
            memory.check(size(config), budget * 2**20, config, size)
        assert caught.value.hint.partition(" with: ")[2] == wanted
    with pytest.raises(PreflightError) as caught:
        memory.check(size(config), 1, config, size)
    assert caught.value.hint.startswith("take a smaller --model; it is 7.0 MiB even with: --per-layer")


def test_what_fits_is_no_error(pretraining):
    memory.check(100, 100, pretraining(), lambda config: pytest.fail("nothing to look for"))


def test_shards_divide_what_is_held_and_gather_what_is_at_hand(pretraining):
    config = pretraining(method="galore", vocab_size=512)
    description = Description(config, dry.architecture(config))
    run, model = description.run(), description.model()
    alone = memory.estimate(run, model)
    assert memory.estimate(run, model, world_size=4).items == alone.items  # DDP: each has everything
    four = memory.estimate(run, model, world_size=4, parallel="fsdp")
    assert four.optimizer_states == pytest.approx(alone.optimizer_states / 4, abs=1)
    # all but the gathered units: the rest of the model and two of its four equal layers
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - 4 * layer
    assert four.most(tracker.WEIGHTS) == pytest.approx(
        alone.most(tracker.WEIGHTS) / 4 + 0.75 * (rest + 2 * layer), rel=1e-6
    )
    one = sharded(alone.parts, model, 1)
    assert [part.total for part in one] == [part.total for part in alone.parts]
    with pytest.raises(ValueError, match="one of ddp, fsdp"):
        memory.estimate(run, model, world_size=2, parallel="pipeline")


def test_a_run_says_its_estimate_beside_the_measured_peak(lowrank, tiny_flags):
    code, out, err = lowrank("pretrain --max-steps 2 --out run --json", *tiny_flags)
    assert code == 0, err
    result = json.loads(out)
    dry_code, dry_out, _ = lowrank("pretrain --max-steps 2 --dry-run --json", *tiny_flags)
    assert dry_code == 0
    estimated = result["estimated_memory_bytes"]
    assert json.loads(Path("run/run.json").read_text())["result"]["estimated_memory_bytes"] == estimated
    assert estimated == json.loads(dry_out)["total_bytes"]
    # the process holds Python and its libraries as well
    assert estimated < result["peak_memory_bytes"]
    assert "estimated for its tensors" in Path("run/log.txt").read_text()
