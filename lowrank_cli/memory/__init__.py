"""Estimate the memory of a run from its configuration alone, by carrying out its own updates on the meta device."""

from lowrank_cli.memory.budget import check
from lowrank_cli.memory.estimate import Estimate, as_json, by_formula, estimate, show
from lowrank_cli.memory.layers import shortened
from lowrank_cli.memory.paper import weights_and_states
from lowrank_cli.memory.simulate import Parts, Run
from lowrank_cli.memory.stand_ins import quantize_

__all__ = [
    "Estimate",
    "Parts",
    "Run",
    "as_json",
    "by_formula",
    "check",
    "estimate",
    "quantize_",
    "shortened",
    "show",
    "weights_and_states",
]
