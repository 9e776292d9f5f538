"""Small gradients in backward are autograd's own: the reference is the same loop with ordinary linears."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from lowrank_cli import GaLoreAdamW
from lowrank_cli.methods.gradnormlorp.space import Normalised
from lowrank_cli.ops.projected_linear import ProjectedLinear
from lowrank_cli.optim.gradients import Gradients

pytestmark = pytest.mark.numerical

SPACES = {"projected": {}, "two-sided": {"proj_type": "full"}, "normalised": {"space": Normalised}}
every_space = pytest.mark.parametrize("tags", SPACES.values(), ids=SPACES)


def model_of(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)


def optimizer_of(model, **tags):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    group = {"params": matrices, "rank": 4, "update_proj_gap": 4, "in_backward": True, **tags}
    return GaLoreAdamW([{"params": [p for p in model.parameters() if p.dim() == 1]}, group], lr=1e-2, eps=1e-3)


def draw(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (6, 24), generator=torch.Generator().manual_seed(step)).double()


@torch.no_grad()
def far(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Return the largest distance of two trained models' tensors, over how far the second has gone."""
    triples = zip(a, b, model_of().parameters(), strict=True)
    return max(float((p - q).norm() / (q - s).norm()) for p, q, s in triples)


def trained(loss, ours: bool, tags: dict, steps: int = 10, before=lambda model, step: None):
    """Train with a loss of (model, step); returns the parameters as the model had them at first."""
    model = model_of()
    params = list(model.parameters())
    optimizer = optimizer_of(model, **tags)
    if ours:
        Gradients(model, optimizer, per_layer=False, clipping=0.0)
    for step in range(steps):
        before(model, step)
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return params


def pruned(model, step):
    if step == 3:
        torch.manual_seed(5)
        prune.random_unstructured(model[0], "weight", 0.5)


class Half(nn.Module):
    def forward(self, x):
        return x * 0.5


def parametrized(model, step):
    if step == 3:
        parametrize.register_parametrization(model[0], "weight", Half(), unsafe=True)


def functional(model, step):
    halves = {name: p * 0.5 for name, p in model.named_parameters()}
    return torch.func.functional_call(model, halves, (draw(step),)).square().mean()


def plain(model, step):
    return model(draw(step)).square().mean()


def recomputed(reentrant: bool):
    def loss(model, step):
        x = draw(step).requires_grad_()
        return checkpoint(lambda x: model[2](model[1](model[0](x))), x, use_reentrant=reentrant).square().mean()

    return loss


def twice(model, step):
    return (model(draw(step)) + model(draw(step + 100))).square().mean()


@every_space
@pytest.mark.parametrize(("loss", "before"), [
    (plain, None), (functional, None), (plain, pruned), (plain, parametrized), (recomputed(False), None),
    (recomputed(True), None), (twice, None),
], ids=["plain", "functional_call", "pruned", "parametrized", "recomputed", "reentrant", "twice"])  # fmt: skip
def test_whatever_is_done_with_the_weight(tags, loss, before):
    before = before or (lambda model, step: None)
    ours, theirs = (trained(loss, ours, tags, before=before) for ours in (True, False))
    assert far(ours, theirs) < 1e-9


@every_space
def test_a_frozen_weight_stays_and_takes_nobody_elses_gradient(tags):
    def adversaries(ours):
        model = model_of()
        optimizer = optimizer_of(model, **tags)
        maker = nn.Linear(8, 24).double()
        maker.load_state_dict({"weight": draw(1, 24, 8), "bias": draw(2, 24)})
        other = torch.optim.SGD(maker.parameters(), lr=0.1)
        if ours:
            Gradients(model, optimizer, per_layer=False, clipping=0.0)
        for step in range(8):
            z = draw(step, 6, 8)
            optimizer.zero_grad()
            (model(draw(step)).square().mean() - model(maker(z).detach()).square().mean()).backward()
            model.requires_grad_(False)
            other.zero_grad()
            model(maker(z)).square().mean().backward()
            other.step()
            model.requires_grad_(True)
            optimizer.step()
        return list(model.parameters())

    assert far(adversaries(True), adversaries(False)) < 1e-9


def test_gradients_of_the_input_alone_leave_nothing_behind():
    model = model_of()
    optimizer = optimizer_of(model)
    gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
    plain(model, 0).backward()
    gradients.step()
    x = draw(1).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    assert not optimizer.low_rank_grads
    bias = model[2].bias
    model(x).sum().backward(inputs=[bias])
    assert not optimizer.low_rank_grads
    assert model[0].weight.grad is None


def test_a_copy_of_the_model_is_an_ordinary_one():
    model = model_of()
    optimizer = optimizer_of(model)
    gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
    plain(model, 0).backward()
    gradients.step()
    twin = copy.deepcopy(model)
    plain(twin, 1).backward()
    assert twin[0].weight.grad is not None
    assert not optimizer.low_rank_grads
    plain(model, 1).backward()
    assert set(optimizer.low_rank_grads) == {model[0].weight, model[2].weight}
    twin.zero_grad()
    assert twin[0].weight.grad is None
    assert optimizer.low_rank_grads
    model.zero_grad()
    assert not optimizer.low_rank_grads
    gradients.close()
    assert type(model[0]) is nn.Linear
    assert "zero_grad" not in vars(model)


def test_under_autocast():
    def run(in_backward):
        model = model_of(torch.float32)
        optimizer = optimizer_of(model, in_backward=in_backward)
        gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
        for step in range(8):
            gradients.begin(measuring=False)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(draw(step).float()).float().square().mean()
            loss.backward()
            gradients.step()
        return list(model.double().parameters())

    # the products are rounded to eight bits, in another order
    assert far(run(True), run(False)) < 8 * 2**-8


def test_a_grad_scaler_scales_and_skips_as_torchs_own():
    def run(scaled):
        model = model_of()
        optimizer = optimizer_of(model, in_backward=False)
        Gradients(model, optimizer, per_layer=False, clipping=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        for step in range(10):
            optimizer.zero_grad()
            loss = plain(model, step)
            if step == 6:
                if not scaled:
                    continue
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return list(model.parameters())

    assert far(run(True), run(False)) < 1e-9


@pytest.mark.parametrize("unscaling", [False, True])
@pytest.mark.parametrize(("per_layer", "in_backward"), [(False, True), (True, False)])
def test_a_grad_scaler_is_refused_where_it_does_not_see_the_gradients(per_layer, in_backward, unscaling):
    model = model_of()
    optimizer = optimizer_of(model, in_backward=in_backward)
    Gradients(model, optimizer, per_layer=per_layer, clipping=0.0)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(plain(model, step)).backward()
        if step or per_layer:
            if unscaling and not per_layer:
                scaler.unscale_(optimizer)
            with pytest.raises(ValueError, match="GradScaler sees `.grad` only"):
                scaler.step(optimizer)
            return
        scaler.step(optimizer)
        scaler.update()


class Wrapped:
    """What Accelerate makes of an optimizer."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, **how):
        self.optimizer.zero_grad(**how)

    def step(self):
        self.steps += 1
        self.optimizer.step()


@pytest.mark.parametrize("inner", [optimizer_of, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)])
def test_a_wrapped_optimizer_is_looked_into_and_stepped_by_its_wrapper(inner):
    model = model_of()
    wrapped = Wrapped(inner(model))
    gradients = Gradients(model, wrapped, per_layer=False, clipping=0.0)
    ours = isinstance(wrapped.optimizer, GaLoreAdamW)
    assert (type(model[0]) is ProjectedLinear) == ours
    plain(model, 0).backward()
    gradients.step()
    assert wrapped.steps == 1


def test_an_optimizer_without_a_step_for_one_tensor_is_refused_per_layer():
    model = model_of()
    with pytest.raises(ValueError, match="SGD cannot step one tensor"):
        Gradients(model_of(), torch.optim.SGD(model.parameters(), lr=0.1), per_layer=True, clipping=0.0)


@pytest.mark.parametrize(("per_layer", "clipping"), [(True, 0.0), (False, 0.5)])
def test_settings_that_are_loaded_later_are_those_that_count(per_layer, clipping):
    def run(first):
        model = model_of()
        optimizer = optimizer_of(model)
        state = copy.deepcopy(optimizer.state_dict())
        if first:
            gradients = Gradients(model, optimizer, per_layer=per_layer, clipping=clipping)
        optimizer.load_state_dict(state)
        if not first:
            gradients = Gradients(model, optimizer, per_layer=per_layer, clipping=clipping)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(6):
            gradients.begin(measuring=False)
            (30 * plain(model, step)).backward()
            gradients.norm()
            gradients.step()
            schedule.step()
        return list(model.parameters())

    assert far(run(True), run(False)) < 1e-12


@pytest.mark.slow
def test_a_compiled_model_trains_as_an_eager_one_without_a_break():
    def run(compiled):
        model = model_of()
        optimizer = optimizer_of(model)
        gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step in range(6):
            gradients.begin(measuring=False)
            call(draw(step)).square().mean().backward()
            gradients.step()
        return list(model.parameters())

    assert far(run(True), run(False)) < 1e-9


@pytest.mark.parametrize(("per_layer", "in_backward"), [(True, False), (False, True), (True, True)])
def test_torchs_ddp_is_refused_where_it_would_sum_nothing(per_layer, in_backward, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = model_of()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = optimizer_of(model, in_backward=in_backward)
        with pytest.raises(ValueError, match="DistributedDataParallel sums"):
            Gradients(parallel, optimizer, per_layer=per_layer, clipping=0.0)
        assert type(model[0]) is nn.Linear
        Gradients(parallel, optimizer_of(model, in_backward=False), per_layer=False, clipping=0.0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_second_optimizer_takes_the_layers_over():
    def run(again):
        model = model_of()
        optimizer = optimizer_of(model)
        gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
        for step in range(2):
            plain(model, step).backward()
            gradients.step()
        if not again:
            gradients.close()
        optimizer = optimizer_of(model)
        second = Gradients(model, optimizer, per_layer=False, clipping=0.0)
        if again:
            second = Gradients(model, optimizer, per_layer=False, clipping=0.0)
        for step in range(2, 6):
            plain(model, step).backward()
            second.step()
        return list(model.parameters())

    assert far(run(True), run(False)) == 0


def test_an_optimizer_that_is_gone_leaves_ordinary_layers_and_no_memory():
    model = model_of()
    optimizer = optimizer_of(model)
    plain(model, 0).backward()
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    # at once: what is left for the garbage collector meets the next optimizer's state on a GPU
    assert gone() is None
    optimizer = optimizer_of(model)
    gradients = Gradients(model, optimizer, per_layer=False, clipping=0.0)
    plain(model, 0).backward()
    gradients.step()
    model.zero_grad = None
    del optimizer, gradients
    gc.collect()
    plain(model, 1).backward()
    assert model[0].weight.grad is not None


def test_a_copied_or_pickled_model_is_made_of_ordinary_layers():
    model = model_of()
    Gradients(model, optimizer_of(model), per_layer=False, clipping=0.0)
    assert type(model[0]) is ProjectedLinear
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is nn.Linear
        assert "handle" not in vars(twin[0])
        assert torch.equal(twin[0].weight, model[0].weight)


def test_a_hook_on_the_weight_gets_the_full_gradient():
    def masked(model, step):
        if step == 2:
            model[0].weight.register_hook(lambda grad: grad * (torch.arange(32) % 2)[:, None])

    ours, theirs = (trained(plain, ours, {}, before=masked) for ours in (True, False))
    assert far(ours, theirs) < 1e-9


def test_closing_leaves_what_was_made_of_the_layers_meanwhile():
    model = model_of()
    gradients = Gradients(model, optimizer_of(model), per_layer=False, clipping=0.0)
    held = model[2].forward
    parametrize.register_parametrization(model[0], "weight", Half(), unsafe=True)
    gradients.close()
    assert model(draw(0)).shape == (6, 16)
    assert held(draw(0, 6, 32)).shape == (6, 16)


def test_an_interrupted_step_leaves_nothing_behind(monkeypatch):
    model = model_of()
    optimizer = optimizer_of(model)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer.rule), "__call__", lambda *_: (_ for _ in ()).throw(MemoryError))
        plain(model, 0).backward()
        with pytest.raises(MemoryError):
            optimizer.step()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    other = model_of()
    fresh = optimizer_of(other)
    for m, o in ((model, optimizer), (other, fresh)):
        o.zero_grad()
        for step in range(1, 4):
            o.zero_grad()
            plain(m, step).backward()
            o.step()
    assert far(list(model.parameters()), list(other.parameters())) == 0


def test_a_gradient_in_parts_is_refused_per_layer():
    model = nn.Linear(16, 16).double()
    optimizer = GaLoreAdamW([{"params": [model.weight], "rank": 4, "update_proj_gap": 9}], lr=1e-2)
    Gradients(model, optimizer, per_layer=True, clipping=0.0)
    x = draw(0, 4, 16).requires_grad_()
    once = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(ValueError, match="in several parts of one backward pass"):
        checkpoint(model, once, use_reentrant=True).square().sum().backward()


def test_a_tensor_that_was_put_into_a_group_by_hand_trains():
    model = model_of()
    optimizer = optimizer_of(model)
    late = nn.Parameter(draw(3, 24, 8))
    optimizer.param_groups[1]["params"].append(late)
    before, late.grad = late.detach().clone(), draw(4, 24, 8)
    plain(model, 0).backward()
    optimizer.step()
    assert not torch.equal(late, before)


def test_a_models_own_zero_grad_is_called_too():
    class Own(nn.Sequential):
        calls = 0

        def zero_grad(self, set_to_none=True):
            self.calls += 1
            super().zero_grad(set_to_none)

    model = Own(*model_of())
    gradients = Gradients(model, optimizer_of(model), per_layer=False, clipping=0.0)
    model.zero_grad()
    gradients.close()
    model.zero_grad()
    assert model.calls == 2
