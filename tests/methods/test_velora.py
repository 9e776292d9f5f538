"""VeLoRA: the factored gradient and Adam against reconstruction and dense Adam, and what is really kept."""

import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from double import BOUND, distance, use_double
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import nn
from watched import watch

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_cli.methods.velora.layer import Compressor
from lowrank_cli.methods.velora.layer import VeLoRA as Layer
from lowrank_cli.methods.velora.space import Factored
from lowrank_cli.ops.projected_linear import Handle
from lowrank_cli.optim.gradients import Gradients

pytestmark = pytest.mark.numerical


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def paper_gradient(x, dy, vector, num_groups, scale):
    """The paper's Algorithm 1 as it stands: rebuild the input, then an ordinary weight gradient."""
    z = x.reshape(-1, x.shape[-1] // num_groups)
    rebuilt = ((z @ vector)[:, None] * vector).reshape(-1, x.shape[-1])
    return scale * dy.reshape(-1, dy.shape[-1]).mT @ rebuilt


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 9), size=st.integers(1, 7), out=st.integers(1, 11), tokens=st.integers(1, 13),
    scale=st.sampled_from([0.1, 1.0, 1.5]), bias=st.booleans(), factored=st.booleans(),
)  # fmt: skip
def test_backward_is_the_papers_reconstruction(groups, size, out, tokens, scale, bias, factored):
    torch.manual_seed(0)
    linear = nn.Linear(groups * size, out, bias=bias).double()
    plain = nn.Linear(groups * size, out, bias=bias).double()
    plain.load_state_dict(linear.state_dict())
    layer = Layer(linear, Compressor(groups, "batch_average_once", 0), scale)
    leaf = torch.zeros(out, groups, dtype=torch.float64, requires_grad=True)
    if factored:
        layer.handle = Handle(SimpleNamespace(leaves=[leaf], weight=linear.weight))
    x = normal(2, tokens, groups * size).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    dy = normal(2, tokens, out)
    y, y2 = linear(x), plain(x2)
    assert torch.equal(y, y2)
    y.backward(dy)
    y2.backward(dy)
    assert torch.allclose(x.grad, x2.grad)
    vector = layer.current_vector()
    assert float(vector.norm()) == pytest.approx(1, abs=1e-12)
    expected = paper_gradient(x.detach(), dy, vector, groups, scale)
    dense = (leaf.grad.unsqueeze(-1) * vector).flatten(1) if factored else linear.weight.grad
    assert torch.allclose(dense, expected, rtol=0, atol=1e-12)
    if factored:
        assert linear.weight.grad is None
        assert float(leaf.grad.norm()) == pytest.approx(float(expected.norm()), rel=1e-12)
    if bias:
        assert torch.allclose(linear.bias.grad, plain.bias.grad)


def test_the_vector_is_the_first_batchs_mean_and_then_stays():
    compressor = Compressor(4, "batch_average_once", 0)
    compressor.users = 1
    first, second = normal(5, 12) + 1, normal(5, 12)
    kept, vector = compressor(first)
    mean = first.reshape(-1, 3).mean(0)
    assert torch.allclose(vector, mean / mean.norm())
    assert torch.allclose(kept, first.reshape(5, 4, 3) @ vector, rtol=0, atol=1e-12)
    assert torch.equal(compressor(second)[1], vector)


def test_other_vectors():
    x, y = normal(50, 12) + 1, normal(50, 12) - 2

    def vector(init, *batches):
        compressor = Compressor(4, init, 7)
        compressor.users = 1
        return [compressor(b)[1] for b in batches][-1]

    def unit(t):
        return t / t.norm()

    mean_x, mean_y = (unit(t.reshape(-1, 3).mean(0)) for t in (x, y))
    assert torch.allclose(vector("batch_average", x, y), mean_y)
    assert torch.allclose(vector("ema_0.9", x, y), unit(0.9 * mean_x + 0.1 * mean_y))
    assert torch.equal(vector("random", x), vector("random", y))
    leading = torch.linalg.svd(x.reshape(-1, 3)).Vh[0]
    assert abs(float(vector("svd", x, y) @ leading)) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(vector("batch_average_once", 0 * x), torch.full_like(mean_x, 3**-0.5))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("per_layer", [False, True])
def test_factored_adam_is_dense_adam_over_100_steps(weight_decay, per_layer):
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=False).double()
    dense = nn.Parameter(linear.weight.detach().clone())
    start = dense.detach().clone()
    layer = Layer(linear, Compressor(6, "random", 0), 1.5)
    group = {"params": [("weight", linear.weight)], "space": Factored, "num_groups": 6}
    optimizer = GaLoreAdamW([group], lr=1e-2, eps=1e-3, weight_decay=weight_decay)
    gradients = Gradients(linear, optimizer, per_layer=per_layer, clipping=0.0)
    reference = GaLoreAdamW([dense], lr=1e-2, eps=1e-3, weight_decay=weight_decay)
    for _ in range(100):
        gradients.begin(measuring=False)
        dense.grad = torch.zeros_like(dense)
        for i in range(2):
            x, dy = normal(7, 24), normal(7, 10)
            gradients.last = i == 1
            linear(x.requires_grad_()).backward(dy)
            dense.grad += paper_gradient(x.detach(), dy, layer.current_vector(), 6, 1.5)
        gradients.step()
        reference.step()
    assert linear.weight.grad is None
    # rounding of 1e-16, over an eps of 1e-3
    assert float((linear.weight - dense).detach().norm()) < 1e-10 * float((dense - start).detach().norm())


@pytest.mark.parametrize(("make", "bound"), [
    # the codes of either side's two moments are off by up to 2^-5 of a moment
    (lambda params: GaLoreAdamW8bit(params, lr=1e-2, weight_decay=0.0, min_8bit_size=1), 2 * 2**-5),
    (lambda params: GaLoreAdafactor(params, lr=1e-2, scale_parameter=False, relative_step=False), BOUND),
], ids=["adamw8bit", "adafactor"])  # fmt: skip
def test_other_rules_on_the_factor_are_their_dense_selves(make, bound):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).double()
    dense = nn.Parameter(linear.weight.detach().clone())
    layer = Layer(linear, Compressor(16, "random", 0), 1.0)
    optimizer = make([{"params": [("weight", linear.weight)], "space": Factored, "num_groups": 16}])
    gradients, reference = Gradients(linear, optimizer, per_layer=False, clipping=0.0), make([dense])
    start = dense.detach().clone()
    for _ in range(20):
        x, dy = normal(40, 64), normal(40, 32)
        linear(x.requires_grad_()).backward(dy)
        dense.grad = paper_gradient(x.detach(), dy, layer.current_vector(), 16, 1.0)
        gradients.step()
        reference.step()
    assert float((linear.weight - dense).detach().norm()) < bound * float((dense - start).detach().norm())


def test_only_the_projections_are_kept_for_backward():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(64, 48, bias=False) for name in "qkv"})
    shared = Compressor(8, "batch_average_once", 0)
    for module in model.values():
        Layer(module, shared, 1.0).sink = lambda factor: None
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in model.parameters()}:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(5, 20, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [module(x) for module in model.values()]
    # one projection of 8 numbers a token for the three of them, and the vector: the input itself is not kept
    assert sum(kept.values()) == 100 * 8 * 4 + 8 * 4
    sum(y.sum() for y in outputs).backward()
    assert x.grad is not None
    assert shared._last is None


def run(lowrank, line: str, *flags: object, out: str = "run") -> dict[str, torch.Tensor]:
    """Return the weights of the model that a run has saved."""
    code, _, err = lowrank(f"pretrain {line} --out {out}", *flags)
    assert code == 0, err
    return load_file(Path(out, "model", "model.safetensors"))


def test_accumulation_and_recomputed_activations_change_nothing(lowrank, tiny_flags, monkeypatch):
    # a fixed vector: one of the first micro-batch would be another one with other micro-batches
    line = "--method velora --velora-init random --velora-layers qkvd --max-steps 10 --total-batch-size 8"
    use_double(monkeypatch.setattr)
    seen = [{}, {}]
    for i, more in enumerate(["--batch-size 8", "--batch-size 2 --activation-checkpointing"]):
        with monkeypatch.context() as patch:
            watch(patch.setattr, seen[i])
            run(lowrank, line, *tiny_flags, *more.split(), out=f"run{i}")
    whole, parts = seen
    assert distance(parts["end"], whole["end"], whole["start"]) < BOUND


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("galore+velora", "adamw8bit"), pytest.param("velora", "adafactor", marks=pytest.mark.slow)],
)
def test_resume_is_bit_identical(method, optimizer, lowrank, tiny_flags):
    line = f"--method {method} --optimizer {optimizer} --max-steps 6"
    whole = run(lowrank, line, *tiny_flags, "--save-every", 3)
    assert lowrank("pretrain --resume run/checkpoints/step-000003")[0] == 0
    again = load_file("run/model/model.safetensors")
    assert all(whole[key].equal(again[key]) for key in whole)


def test_a_stop_within_an_update_does_not_move_the_vector_twice(lowrank, tiny_flags, monkeypatch):
    """The first micro-batch of an update that a signal ends has moved the mean; the run goes on from before it."""
    from lowrank_cli.train import loop

    line = "--method velora --velora-init ema_0.5 --max-steps 6 --total-batch-size 8"
    whole = run(lowrank, line, *tiny_flags, out="whole")
    seen, original = [], loop.Causal.loss

    def watched(self, *args):
        seen.append(1)
        if len(seen) == 7:  # the first of two in the fourth update
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Causal, "loss", watched)
        code, _, err = lowrank(f"pretrain {line} --out stopped", *tiny_flags)
    assert code == 130, err
    assert "after step 3 of 6" in err
    assert lowrank("pretrain --resume stopped")[0] == 0
    again = load_file("stopped/model/model.safetensors")
    assert all(whole[key].equal(again[key]) for key in whole)


def test_galore_takes_what_velora_leaves_and_a_run_says_what_is_freed(lowrank, tiny_flags):
    run(lowrank, "--method galore+velora --max-steps 2", *tiny_flags)
    rows = {row["name"].split(".")[-2]: row for row in json.loads(Path("run/targets.json").read_text())}
    galore = {name for name, row in rows.items() if row["role"] == "galore"}
    assert galore == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"}
    assert {name: row["why"] for name, row in rows.items() if row["role"] == "velora"} == {
        "v_proj": "frees nothing: q_proj and k_proj keep the same input",
        "down_proj": "keeps 8 of 88 numbers a token",
    }
    # an eighth of the weight or less
    state = load_file("run/checkpoints/step-000002/optimizer.safetensors")
    for name, shape in (("self_attn.v_proj", (32, 32)), ("mlp.down_proj", (32, 88))):
        held = sum(t.nbytes for k, t in state.items() if k.startswith(f"model.layers.0.{name}."))
        assert 0 < held <= 8 * shape[0] * shape[1] / 8


@pytest.mark.parametrize(("flags", "parts"), [
    ("--velora-num-groups 5", ["--velora-num-groups 5 does not divide the 32 features", "nearest: 4, 8"]),
    ("--velora-group-size 7", ["--velora-group-size 7 does not divide"]),
    ("--velora-num-groups 4,4,4", ["3 numbers for 2 kinds of layers", "v d"]),
    ("--velora-layers x", ["--velora-layers x", "q_proj"]),
    ("--velora-init best", ["--velora-init is 'best'", "batch_average_once"]),
    ("--velora-init ema_2", ["--velora-init is 'ema_2'"]),
    ("--velora-init ema_0.9 --activation-checkpointing", ["moves its vector again"]),
])  # fmt: skip
def test_bad_settings(flags, parts, lowrank, tiny_flags):
    code, _, err = lowrank(f"pretrain --method velora {flags}", *tiny_flags)
    assert code == 2, err
    for part in parts:
        assert part in err
    assert not Path("runs").exists()


def test_wraps_bert_like_models():
    from transformers import BertConfig, BertModel

    from lowrank_cli import methods

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    method = methods.get("velora")(methods.get("velora").Config())
    names = {name.split(".", 2)[2] for name in method.targets(BertModel(config))}
    assert names == {"0.attention.self.value", "0.output.dense"}


def test_a_weight_in_anothers_place_and_a_copy_get_gradients_of_their_own():
    linear = nn.Linear(12, 5, bias=False).double()
    Layer(linear, Compressor(3, "batch_average_once", 0), 1.0)
    optimizer = GaLoreAdamW([{"params": [("weight", linear.weight)], "space": Factored, "num_groups": 3}], lr=1e-2)
    Gradients(linear, optimizer, per_layer=False, clipping=0.0)
    x = normal(4, 12) + 1
    other = normal(5, 12).requires_grad_()
    torch.func.functional_call(linear, {"weight": other}, (x,)).square().sum().backward()
    assert other.grad is not None
    assert not optimizer.low_rank_grads
    twin = copy.deepcopy(linear)
    twin(x).square().sum().backward()
    assert twin.weight.grad is not None
    assert not optimizer.low_rank_grads
    linear(x).square().sum().backward()
    assert linear.weight.grad is None
    assert optimizer.low_rank_grads[linear.weight].shape == (5, 3)
