"""DoRA, through the PEFT library: LoRA's update, with the length of every output row trained apart from its direction.

    W = m * (W0 + alpha / r * B A) / ||W0 + alpha / r * B A||,   m: the norms of the rows, trained

PEFT holds the norm constant in backward, as the paper's section 4.3 proposes. Liu et al., arXiv:2402.09353. For the
exact gradient, a factored norm and projected gradients see gradnormlorp.py.
"""

from __future__ import annotations

from lowrank_cli.methods.lora import LoRA


class DoRA(LoRA):
    title = "DoRA"
    paper = "https://arxiv.org/abs/2402.09353"
    summary = "LoRA with the rows' magnitudes trained apart from it"
    instead_of_full = frozenset()  # where LoRA fits, it takes less
    dora = True
