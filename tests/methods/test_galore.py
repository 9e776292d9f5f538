"""GaLore's ranks, and the bytes that its paper counts."""

from lowrank_cli import methods
from lowrank_cli.config import resolve

GaLore = methods.get("galore")


def test_a_rank_is_the_configured_one_or_a_quarter_of_the_shorter_side():
    method = GaLore(resolve("pretrain", {"method": "galore"}, {}).methods["galore"])
    assert method.rank_for((128, 352)) == 32
    assert method.rank_for((20, 352)) == 20


def test_states_are_those_of_the_papers_table():
    # Table 1, 60M: 56 matrices at rank 128; bases and two moments, in float32
    shapes = 32 * [(512, 512)] + 16 * [(1376, 512)] + 8 * [(512, 1376)]
    method = GaLore(GaLore.Config(rank=128))
    assert sum(method.memory(s).states for s in shapes) == 4 * 128 * sum(min(s) + 2 * max(s) for s in shapes)
