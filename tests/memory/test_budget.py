"""--dry-run and --memory-budget as a user meets them, and a process's share under FSDP."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path

import pytest

from lowrank_cli import memory
from lowrank_cli.config import resolve
from lowrank_cli.errors import MissingError, PreflightError
from lowrank_cli.memory import tracker
from lowrank_cli.memory.budget import Search
from lowrank_cli.memory.estimate import sharded
from lowrank_cli.memory.knobs import KNOBS
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
    line = f"pretrain --model-config {tiny_config} --vocab-size 512 --memory-budget 3MB"
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


def test_cheap_knobs_come_first_and_no_knob_is_turned_in_vain(pretraining):
    config = pretraining(batch_size=8, dtype="float32")
    for budget, wanted in [
        (33, "--per-layer"),
        (30, "--per-layer --batch-size 4 --total-batch-size 8"),
        (20, "--per-layer --batch-size 1 --total-batch-size 8"),
        (18, "--per-layer --batch-size 1 --total-batch-size 8 --activation-checkpointing"),
        # recomputing activations would not be enough, and with 8 bits it is not needed
        (16, "--per-layer --batch-size 2 --total-batch-size 8 --optimizer adamw8bit"),
    ]:
        with pytest.raises(PreflightError) as caught:
            memory.check(size(config), budget * 2**20, config, size)
        assert caught.value.hint.partition(" with: ")[2] == wanted
    with pytest.raises(PreflightError) as caught:
        memory.check(size(config), 1, config, size)
    assert caught.value.hint.startswith("take a smaller --model; it is 7.0 MiB even with: --per-layer")


def entangled(config) -> int:
    """A stand-in in which three knobs help or harm as the others stand."""
    batch, recomputed = config.train.batch_size, config.model.activation_checkpointing
    accumulated = batch < (config.train.total_batch_size or batch)
    gradients = 16 + 4 * accumulated if not config.optim.per_layer else 24 if accumulated else 2
    activations = batch * config.data.max_length // (64 if not recomputed else 256)
    factors = 3 if recomputed else -activations // 2
    return (
        (8 if config.model.dtype == "float32" else 4)
        + (8 if config.optim.optimizer == "adamw" else 1 + 9 * config.optim.per_layer)
        + gradients + activations + (factors if "velora" in config.method else 0)
        - (1 if "galore" in config.method else 0)
    )  # fmt: skip


@pytest.mark.slow
def test_a_plan_is_found_whenever_there_is_one_and_it_is_the_cheapest(pretraining):
    config = pretraining(batch_size=4, dtype="float32")
    search = Search(config, 0, lambda config: (entangled(config), 0))
    far = [len(knob.steps(config, config.flat())) for knob in KNOBS]
    plans = [search.plan(wanted) for wanted in product(*(range(steps + 1) for steps in far))]
    sizes = {plan.turned: entangled(plan.config) for plan in plans}
    assert len(sizes) > 300
    for budget in range(min(sizes.values()) - 1, max(sizes.values())):
        fitting = [turned for turned, held in sizes.items() if held <= budget]
        counted = []
        found = Search(config, budget, lambda c, counted=counted: counted.append(c) or (entangled(c), 0)).cheapest()
        # the costliest knob decides, then the next
        assert (found and found.turned) == min(fitting, key=lambda turned: turned[::-1], default=None)
        assert len(counted) < len(sizes) / 4


def test_what_is_kept_between_updates_rules_out_all_plans_with_the_same_updates(pretraining):
    counted = []

    def estimate(config) -> tuple[int, int]:
        counted.append(config)
        kept = 100 if config.model.dtype == "float32" else 10
        return kept + config.train.batch_size, kept

    found = Search(pretraining(batch_size=4, dtype="float32"), 12, estimate, kept=100).cheapest()
    assert found.typed == "--batch-size 2 --total-batch-size 4 --dtype bfloat16"
    other = [config for config in counted if config.model.dtype == "float32"]
    # one for each choice of an optimizer and a method
    assert len({(config.method, config.optim.optimizer) for config in other}) == len(other)


def test_what_the_command_refuses_is_never_proposed(finetuning):
    config = finetuning(method="vblora", dtype="float32")
    search = Search(config, 0, lambda config: (1, 0))
    assert search.cheapest() is None
    assert search.sizes
    for turned in search.sizes:
        plan = search.plan(turned)
        # its factors come from one bank, so no gradient is whole before the last one
        assert "--per-layer" not in plan.typed
        assert resolve("finetune", {k: v for k, v in plan.config.flat().items() if not isinstance(v, dict)}, {})
    clipped = finetuning(method="full", grad_clipping=1.0)
    search = Search(clipped, 0, lambda config: (1, 0))
    search.cheapest()
    # clipping waits for the norm of all gradients, and only an adapter's base can be in 4 bits
    assert not any("--per-layer" in search.plan(turned).typed for turned in search.sizes)
    assert not any(
        "nf4" in search.plan(turned).typed and "lora" not in search.plan(turned).typed for turned in search.sizes
    )


def test_a_package_that_is_not_there_is_not_proposed(pretraining):
    def without_bitsandbytes(config) -> tuple[int, int]:
        if config.optim.optimizer == "adamw8bit":
            raise MissingError("--optimizer adamw8bit needs bitsandbytes", "pip install bitsandbytes")
        return size(config), 0

    config = pretraining(batch_size=1, dtype="float32")
    found = Search(config, 15 * 2**20, without_bitsandbytes).cheapest()
    assert found.typed == "--per-layer --dtype bfloat16"


def test_a_7b_model_in_24_gb_has_a_plan_that_fits(lowrank):
    line = "pretrain --method galore --model llama-7b --dtype bfloat16"
    began = time.process_time()
    code, _, err = lowrank(f"{line} --memory-budget 24GB")
    assert time.process_time() - began < 20
    assert code == 3
    flags = err.partition("hint: ")[2].partition(" with: ")[2].strip()
    # 28 GiB or more with any two of them
    assert flags == "--per-layer --activation-checkpointing --optimizer adamw8bit"
    code, out, err = lowrank(f"{line} --memory-budget 24GB {flags} --dry-run --json")
    assert code == 0, err
    assert json.loads(out)["total_bytes"] <= 24 * 2**30


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
