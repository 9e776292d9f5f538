"""The optimizers under what other people's loops do to an optimizer: torch.optim's own behaviour is the reference."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

from lowrank_cli import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_cli.methods.gradnormlorp.space import Normalised

pytestmark = pytest.mark.numerical

MAKERS = {
    "adamw": functools.partial(GaLoreAdamW, lr=1e-2),
    "adamw8bit": functools.partial(GaLoreAdamW8bit, lr=1e-2, min_8bit_size=1),
    "adafactor": functools.partial(GaLoreAdafactor, lr=1e-2, scale_parameter=False, relative_step=False),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, params, steps: range) -> None:
    for step in steps:
        for p in params:
            p.grad = draw(*p.shape, seed=step).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    "cut", [lambda t: t[:, :6], lambda t: t[::2], lambda t: t.view(8, 6, 2)[..., 0], lambda t: t.mT], ids=range(4)
)
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_weight_that_is_a_part_of_a_tensor_trains_whole_and_nothing_else_moves(cut, eight_bits):
    whole = draw(8, 12).double()
    start, foreign = whole.clone(), torch.ones(8, 12, dtype=torch.bool)
    cut(foreign).fill_(False)
    part, dense = nn.Parameter(cut(whole)), nn.Parameter(cut(whole).clone().contiguous())
    if eight_bits:
        ours, theirs = (GaLoreAdamW8bit([p], lr=1e-2, weight_decay=0.0, min_8bit_size=1) for p in (part, dense))
    else:
        ours, theirs = GaLoreAdamW([part], lr=1e-2, convention="torch", eps=1e-8), torch.optim.AdamW(
            [dense], lr=1e-2, weight_decay=0.0
        )  # fmt: skip
    for optimizer, p in ((ours, part), (theirs, dense)):
        train(optimizer, [p], range(5))
    assert torch.equal(whole[foreign], start[foreign])
    # blocks of 8-bit moments lie otherwise in memory: their codes are off by up to 2^-5
    assert float((part - dense).detach().norm()) < (2 * 2**-5 if eight_bits else 1e-9) * 5e-2 * 72**0.5


RANK_CHANGES = """
import torch
from lowrank_cli import GaLoreAdamW
p = torch.nn.Parameter(torch.randn(32, 24))
optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "update_proj_gap": 2}], lr=1e-2)
for step in range(12):
    if step == 3: optimizer.param_groups[0]["rank"] = RANK
    p.grad = torch.randn(32, 24)
    optimizer.step()
"""


@pytest.mark.parametrize("rank", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_changes_is_an_error_and_never_foreign_memory(rank):
    # in a process of its own: what this guards against is a segmentation fault
    done = subprocess.run([sys.executable, "-c", RANK_CHANGES.replace("RANK", str(rank))], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert "ValueError: moments of (32, 4) for a gradient of (32, " in done.stderr
    assert "rank changed" in done.stderr


@every
def test_a_group_that_is_refused_does_not_stay(make):
    p, q = nn.Parameter(draw(6, 4)), nn.Parameter(draw(6, 4))
    optimizer = make([p])
    for bad in ({"rank": 0}, {"maximize": True}, {"rank": 2, "refresh": "nothing"}):
        with pytest.raises(ValueError, match=r"rank is 0|maximize=True|refresh is"):
            optimizer.add_param_group({"params": [q], **bad})
    assert len(optimizer.param_groups) == 1
    train(optimizer, [p], range(2))


@every
def test_an_empty_group_saves_and_loads(make):
    p = nn.Parameter(draw(6, 4))
    optimizer = make([{"params": []}, {"params": [p], "rank": 2}])
    train(optimizer, [p], range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, [p], range(2, 4))


@every
@pytest.mark.parametrize("what", ["another optimizer", "another size", "another dtype", "another rank"])
def test_a_state_that_does_not_fit_is_refused_by_name_before_anything_changes(make, what):
    tags = {"rank": 2, "update_proj_gap": 5}
    p = nn.Parameter(draw(40, 24))
    optimizer = make([{"params": [("layer.weight", p)], **tags}])
    train(optimizer, [p], range(2))
    before = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(before)
    entries = other["state"][0]
    if what == "another optimizer":
        torch_one = torch.optim.SGD([p], lr=1e-2, momentum=0.9)
        torch_one.step()
        entries.clear()
        entries.update(torch_one.state_dict()["state"][0], step=2)
    elif what == "another size":
        entries["basis_right"] = entries["basis_right"][:-1]
    else:
        key = next(k for k in entries if k.startswith("exp_avg") and entries[k].dim())
        entries[key] = entries[key].half() if what == "another dtype" else entries[key][..., :-1]
    with pytest.raises(ValueError, match=r"the state of layer\.weight has"):
        optimizer.load_state_dict(other)
    for key, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), key


def test_a_state_of_torchs_adamw_goes_on():
    p, q = nn.Parameter(draw(6, 4).double()), nn.Parameter(draw(6, 4).double())
    theirs, ours = torch.optim.AdamW([p], lr=1e-2), GaLoreAdamW([q], convention="torch")
    train(theirs, [p], range(3))
    q.data.copy_(p.data)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer, weight in ((theirs, p), (ours, q)):
        train(optimizer, [weight], range(3, 6))
    assert float((p - q).detach().abs().max()) < 1e-12


def test_what_a_load_hook_returns_is_loaded():
    a, b = nn.Parameter(draw(12, 9)), nn.Parameter(draw(12, 9, seed=1))
    c, d = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())
    group = {"rank": 4, "update_proj_gap": 50}
    first = GaLoreAdamW([{"params": [a, b], **group}], lr=1e-2)
    swapped = GaLoreAdamW([{"params": [d, c], **group}], lr=1e-2)
    for p in (a, b):
        p.grad = draw(12, 9, seed=2)
    first.step()
    c.data.copy_(a.data)
    d.data.copy_(b.data)
    swapped.register_load_state_dict_pre_hook(
        lambda _, sd: {"state": {0: sd["state"][1], 1: sd["state"][0]}, "param_groups": sd["param_groups"]}
    )
    swapped.load_state_dict(copy.deepcopy(first.state_dict()))
    for p in (a, b, c, d):
        p.grad = draw(12, 9, seed=3)
    first.step()
    swapped.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)


@every
@pytest.mark.parametrize("tags", [{}, {"rank": 4, "update_proj_gap": 1000}], ids=["plain", "projected"])
def test_infinity_in_a_gradient_shows_in_the_weight(make, tags):
    p = nn.Parameter(draw(32, 24))
    optimizer = make([{"params": [p], **tags}])
    train(optimizer, [p], range(2))
    p.grad = draw(32, 24)
    p.grad[2, 3] = float("inf")
    optimizer.step()
    assert not torch.isfinite(p).all()


def test_nothing_moves_where_one_gradient_stops_a_refresh():
    sound, broken = nn.Parameter(draw(8, 6)), nn.Parameter(draw(8, 6))
    optimizer = GaLoreAdamW([{"params": [sound, broken], "rank": 2}], lr=1e-2)
    sound.grad, broken.grad = draw(8, 6), torch.full((8, 6), float("nan"))
    with pytest.raises(FloatingPointError, match="the gradient of tensor 1 is not finite"):
        optimizer.step()
    assert torch.equal(sound.detach(), draw(8, 6))


@every
def test_a_step_inside_autocast_is_the_same_step(make):
    found = []
    for inside in (False, True):
        weights = [nn.Parameter(draw(32, 24)), nn.Parameter(draw(16, 32))]
        optimizer = make([{"params": weights, "rank": 4, "update_proj_gap": 3, "proj_type": "full"}])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            train(optimizer, weights, range(7))
        found.append(weights)
    for plain, mixed in zip(*found, strict=True):
        assert torch.equal(plain, mixed)


@every
def test_a_compiled_step_is_the_same_step(make):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        weights = [nn.Parameter(draw(16, 12)), nn.Parameter(draw(12))]
        optimizer = make([{"params": weights[:1], "rank": 4, "update_proj_gap": 2}, {"params": weights[1:]}])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(5):
            for p in weights:
                p.grad = draw(*p.shape, seed=i)
            step()
        found.append(weights)
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_every_key_of_the_state_is_there_after_the_first_step():
    p = nn.Parameter(draw(16, 12))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2, "update_proj_gap": 2, "lazy_refresh": True}], lr=1e-2)
    train(optimizer, [p], range(1))
    first = set(optimizer.state[p])
    for _ in range(12):
        p.grad = draw(16, 12)
        optimizer.step()
    assert set(optimizer.state[p]) == first


def test_a_cut_tensor_of_fsdp_is_refused_before_anything_moves():
    p = nn.Parameter(draw(6, 4))
    p.device_mesh = object()  # what tells a DTensor
    with pytest.raises(ValueError, match="DTensor"):
        GaLoreAdamW([{"params": [p], "rank": 2}], lr=1e-2)


def test_a_state_of_another_methods_group_is_refused_and_nothing_of_it_dropped():
    p, q = nn.Parameter(draw(12, 9)), nn.Parameter(draw(12, 9))
    normalised = GaLoreAdamW([{"params": [p], "rank": 2, "space": Normalised}])
    train(normalised, [p], range(2))
    projected = GaLoreAdamW([{"params": [q], "rank": 2}])
    with pytest.raises(ValueError, match="which this group of GaLoreAdamW does not keep"):
        projected.load_state_dict(copy.deepcopy(normalised.state_dict()))
    assert not projected.state
