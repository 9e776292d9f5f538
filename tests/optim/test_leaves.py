"""Small gradients in backward are autograd's own: the reference is the same loop with ordinary linears."""

import copy

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


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_grad_scaler_scales_and_skips(in_backward):
    def run(scaled):
        model = model_of()
        optimizer = optimizer_of(model, in_backward=in_backward)
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


def test_a_scale_that_is_gone_is_refused():
    model = model_of()
    optimizer = optimizer_of(model)
    Gradients(model, optimizer, per_layer=False, clipping=0.0)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(plain(model, step)).backward()
        scaler.unscale_(optimizer)
        if step:
            with pytest.raises(ValueError, match="unscale_ does not see"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
            scaler.update()


class Wrapped:
    """What Accelerate makes of an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_a_wrapped_optimizer_is_looked_into():
    model = model_of()
    optimizer = optimizer_of(model)
    Gradients(model, Wrapped(optimizer), per_layer=False, clipping=0.0)
    assert type(model[0]) is ProjectedLinear
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
