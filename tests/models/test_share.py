"""Every run says what share of the layers it acts on, and a run that would leave most of them alone stops."""

import json
import re

import pytest
from tiny_models import CONFIGS, tiny, tiny_config
from torch import nn

from lowrank_cli.models.share import Inventory, inventory

DRY = "pretrain --model-config tiny.json --dry-run --max-length 16 --batch-size 2 --method"


def described(model_type):
    """Write a configuration as `--model-config` reads it."""
    with open("tiny.json", "w") as file:
        json.dump(tiny_config(model_type).to_dict(), file, default=str)


def counted(model, pattern) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if re.search(pattern, name))


@pytest.mark.parametrize(
    ("model_type", "method", "acted_on"),
    [
        ("mixtral", "galore", r"layers.*(_proj)"),
        ("mixtral", "full", r"layers\."),
        ("llama", "galore+velora", r"layers.*(_proj)"),
        ("llama", "velora", r"layers.*(v_proj|down_proj)"),
        ("llama", "galore --galore-target-modules q_proj", r"layers.*q_proj"),
    ],
)
def test_the_share_of_the_layers_is_said(model_type, method, acted_on, tmp_path, lowrank):
    described(model_type)
    code, out, err = lowrank(f"{DRY} {method} --json")
    assert code == 0, err
    model = tiny(model_type)
    share = counted(model, acted_on) / counted(model, r"layers\.")
    found = json.loads(out)
    assert found["treated_share"] == pytest.approx(share)
    assert sum(found["left_share"].values()) == pytest.approx(1 - share)
    assert f"acts on {share:.1%} of the layers' parameters" in err
    if model_type == "mixtral" and method == "galore":
        routers = counted(model, r"mlp\.gate\.") / counted(model, r"layers\.")
        assert found["left_share"]["router"] == pytest.approx(routers)


def test_a_run_that_leaves_most_of_the_layers_alone_stops(tmp_path, lowrank):
    # a wide convolution is nearly all of such a layer
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config("mamba", conv_kernel=512).to_dict(), default=str))
    code, _, err = lowrank(f"{DRY} galore")
    assert code == 2
    assert "galore acts on only" in err
    assert "convolution" in err
    assert "--allow-partial" in err
    code, _, err = lowrank(f"{DRY} galore --allow-partial")
    assert code == 0, err
    # a choice of one's own is no surprise
    code, _, err = lowrank(f"{DRY} galore --galore-target-modules in_proj")
    assert code == 0, err


def test_every_joined_method_acts_on_something(tmp_path, lowrank):
    described("llama")
    line = "galore+velora --galore-target-modules q_proj --velora-layers q_proj"
    code, _, err = lowrank(f"{DRY} {line}")
    assert code == 2
    assert "galore finds no tensor to act on in this model" in err


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_an_inventory_has_the_parameters_of_the_layers(model_type):
    model = tiny(model_type)
    found = inventory(model)
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: counted(m, ""))
    assert sum(found.sizes.values()) == counted(layers, "")
    assert found.share(found.sizes).treated == 1
    assert found.share(()).treated == 0


def test_a_share_of_nothing_is_none():
    assert Inventory({}, {}).share(()).treated == 1


@pytest.mark.parametrize("more", ["", "--dry-run"])
def test_a_compression_says_what_share_it_is_of(more, tmp_path, lowrank):
    model = tiny("mixtral")
    model.float().save_pretrained("model")
    line = f"compress --model model --welore-weighting none --eval-tokens 0 --no-plots --json {more} --out"
    code, out, err = lowrank(f"{line} run")
    assert code == 0, err
    share = counted(model, r"layers.*_proj") / counted(model, r"layers\.")
    assert json.loads(out)["treated_share"] == pytest.approx(share)
    assert f"welore compresses {share:.1%} of the layers' parameters" in err
    tiny("mamba", conv_kernel=512).float().save_pretrained("convolved")
    line = line.replace("--model model", "--model convolved")
    code, _, err = lowrank(f"{line} other")
    assert code == 2
    assert "welore compresses only" in err
    code, _, err = lowrank(f"{line} other --allow-partial")
    assert code == 0, err
