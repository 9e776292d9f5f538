"""Fira and APOLLO against their papers' algorithms, written out in float64 with everything kept."""

import pytest
import torch

from lowrank_cli import GaLoreAdamW, methods
from lowrank_cli.methods import apollo, fira

pytestmark = pytest.mark.numerical

BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-6, 0.05, 0.1


class Adam:
    """N of R: M^ / (sqrt(V^) + eps)."""

    def __init__(self):
        self.m = self.v = self.t = 0

    def __call__(self, r):
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * r
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * r**2
        return self.m / (1 - BETAS[0] ** self.t) / ((self.v / (1 - BETAS[1] ** self.t)).sqrt() + EPS)


def limited(move, last):
    norm = move.norm()
    return move if last is None or norm <= 1.01 * last else move * (1.01 * last / norm)


def grads(m, n, count):
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(m, n, generator=draw, dtype=torch.float64)
    # now larger and now smaller: the limiter has work
    others = [torch.randn(m, n, generator=draw, dtype=torch.float64) for _ in range(count)]
    return [(common + other) * (3 if i % 3 else 1) for i, other in enumerate(others)]


def run(space, gradients, **tags):
    weight = torch.nn.Parameter(torch.randn(gradients[0].shape, generator=torch.Generator().manual_seed(1)).double())
    group = {"params": [("w", weight)], "space": space, "weight_decay": DECAY, **tags}
    optimizer = GaLoreAdamW([group], lr=LR, betas=BETAS, eps=EPS, convention="torch")
    path = [weight.detach().clone()]
    for grad in gradients:
        weight.grad = grad.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path, optimizer


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (15, 15)])
def test_fira_is_its_papers_algorithm(m, n):
    gradients, gap, rank, alpha = grads(m, n, 9), 4, 3, 0.5
    path, _ = run(fira.space(), gradients, rank=rank, update_proj_gap=gap, scale=alpha)
    w, adam, last, left = path[0], Adam(), None, m < n
    for i, g in enumerate(gradients):
        if i % gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = u[:, :rank] if left else vh[:rank].mT
        r = p.mT @ g if left else g @ p
        back = (lambda x, p=p: p @ x) if left else (lambda x, p=p: x @ p.mT)
        normal, dim = adam(r), 0 if left else 1
        rest = (g - back(r)) * (normal.norm(dim=dim, keepdim=True) / r.norm(dim=dim, keepdim=True))
        rest = limited(rest, last)
        last = rest.norm()
        w = (1 - LR * DECAY) * w - LR * alpha * (back(normal) + rest)
        assert torch.allclose(path[i + 1], w, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 4])
def test_apollo_is_its_papers_algorithm(m, n, rank):
    gradients, gap, alpha = grads(m, n, 7), 3, 1.5
    space = apollo.space()
    drawn, left = [], m < n
    original = space.bases

    def bases(self):
        found = original(self)
        drawn.append(next(iter(found.values())).clone())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "bases", bases)
        path, optimizer = run(space, gradients, rank=rank, update_proj_gap=gap, scale=alpha)
    w, adam, last = path[0], Adam(), None
    for i, (g, p) in enumerate(zip(gradients, drawn, strict=True)):
        r = p.mT @ g if left else g @ p
        normal = adam(r)
        if rank == 1:
            factors = normal.norm() / r.norm()
        else:
            factors = normal.norm(dim=0 if left else 1, keepdim=True) / r.norm(dim=0 if left else 1, keepdim=True)
        move = limited(g * factors, last)
        last = move.norm()
        w = (1 - LR * DECAY) * w - LR * alpha * move
        assert torch.allclose(path[i + 1], w, rtol=0, atol=1e-11)
    # the same draw within a gap, another one after it
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])
    # N(0, 1 / r): its mean square over many is 1 / r
    assert float(torch.cat(drawn).square().mean()) == pytest.approx(1 / rank, rel=0.5)
    (state,) = optimizer.state.values()
    assert not any("basis" in key for key in state)


def test_a_warm_up_is_no_growth():
    gradients = grads(6, 9, 4)
    weight = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    optimizer = GaLoreAdamW([{"params": [weight], "space": apollo.space(), "rank": 2, "update_proj_gap": 9,
                              "scale": 1.0}], lr=1.0)  # fmt: skip
    moved = []
    for step, rate in enumerate((0.0, 0.01, 0.1, 1.0)):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad, before = gradients[0].clone(), weight.detach().clone()
        optimizer.step()
        moved.append(float((weight.detach() - before).norm()))
        assert bool(weight.isfinite().all()), step
    assert moved[0] == 0
    assert moved[2] == pytest.approx(10 * moved[1], rel=0.02)
    assert moved[3] == pytest.approx(10 * moved[2], rel=0.02)


def test_a_gradient_of_zeros_and_rows_of_zeros_stay_finite():
    for space in (fira.space(), apollo.space()):
        weight = torch.nn.Parameter(torch.ones(6, 9))
        optimizer = GaLoreAdamW([{"params": [weight], "space": space, "rank": 2, "update_proj_gap": 2, "scale": 1.0}])
        for grad in (torch.zeros(6, 9), torch.eye(6, 9), torch.zeros(6, 9), torch.eye(6, 9)):
            weight.grad = grad
            optimizer.step()
            assert bool(weight.isfinite().all())


def test_rank_1_is_apollo_mini_with_its_scale():
    weights = [(f"model.layers.{i}.mlp.up_proj.weight", torch.nn.Parameter(torch.ones(8, 6))) for i in range(2)]

    class Layer(torch.nn.Module):
        pass

    for rank, scale in ((1, 128**0.5), (4, 1.0)):
        method = methods.get("apollo")(apollo.Apollo.Config(rank=rank))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lowrank_cli.models.targets.matrices", lambda *_: dict(weights))
            (group,) = method.param_groups(Layer(), [{"params": weights, "role": "full"}])
        assert (group["rank"], group["scale"]) == (rank, scale)
