"""Report a compression: result.json, ranks.json, ranks.csv, the map of ranks, and the lines on the screen."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

from lowrank_cli import console
from lowrank_cli.compress.decomposition import Targets
from lowrank_cli.errors import UsageError
from lowrank_cli.methods import Method
from lowrank_cli.run import RunDir, write_json
from lowrank_cli.svd.rank_selection import Ranks, Spectra

# share of the singular values that a rule may miss its target by before a word is said
MISSED = 0.005
# a perplexity of so many times the one before has a warning
LOST = 2.0
COLUMNS = (
    "name", "experts", "out", "in", "rank", "full_rank", "role", "parameters_before", "parameters_after", "error",
    "why",
)  # fmt: skip


def rows(targets: Targets, ranks: Ranks, plain: Spectra, weighted: Spectra) -> list[dict[str, Any]]:
    """Return a row for each linear, and each parameter of experts: rank, role (LRC, N-LRC or skipped), parameters.

    `out` and `in` of experts are the sides of one matrix as the architecture stores it. `error` is the relative error
    of the (weighted) weight in the Frobenius norm.
    """
    table = []
    for name, rank in ranks.items():
        *experts, m, n = plain.shapes[name]
        squares = weighted.values[name].double().square()
        lost = 0.0 if rank is None else float((squares[rank:].sum() / squares.sum().clamp(min=1e-300)).sqrt())
        table.append(
            {
                "name": name, "experts": experts[0] if experts else None, "out": m, "in": n,
                "rank": rank if rank is not None else min(m, n),
                "full_rank": min(m, n), "role": "N-LRC" if rank is None else "LRC",
                "parameters_before": plain.parameters(name, None), "parameters_after": plain.parameters(name, rank),
                "error": lost, "why": "",
            }
        )  # fmt: skip
    return table + [{"name": name, "role": "skipped", "why": why} for name, why in targets.skipped.items()]


def about(part: Method, plain: Spectra, ranks: Ranks) -> dict[str, Any]:
    """Return the target of the rule that chose the ranks, and the shares that these ranks come to."""
    reached, goal = part.reached(plain, ranks)
    return {
        "allocation": part.allocation,
        "target": part.target,
        "target_share": goal,
        "reached_share": reached,
        "rank_reduction": plain.rank_reduction(ranks),
        "linear_parameter_share": plain.parameter_share(ranks),
        "low_rank_components": sum(rank is not None for rank in ranks.values()),
        "linears": len(ranks),
    }


def check(part: Method, spectra: Spectra, ranks: Ranks) -> None:
    """Say how far ranks are from the target, if they are.

    Raises:
        UsageError: more parameters than the budget allows, or nothing was cut though something was to be.
    """
    reached, goal = part.reached(spectra, ranks)
    budget = part.config.rank is None
    if budget and reached > goal + 1e-9:
        raise UsageError(
            f"no ranks of the rule {part.allocation} keep only {100 * goal:g} % of the parameters: "
            f"they come to {100 * reached:.1f} %",
            "take a larger budget" + (f", or a lower {part.flag('min_ratio')}" if part.reads_own_values else ""),
        )
    asked = goal < 1 if budget else goal > 0
    if asked and all(rank is None for rank in ranks.values()):
        raise UsageError(
            f"at {part.target} the rule {part.allocation} leaves every linear dense",
            "cut more: a square linear is smaller only below half of its rank, with "
            f"{part.flag('pifa')} below all of it"
            + (
                f", and none is factored that loses less than {part.flag('min_ratio')}"
                if part.reads_own_values
                else ""
            ),
        )
    if not budget and abs(reached - goal) > MISSED:
        console.warn(f"{100 * reached:.1f} % instead of {part.target}: the rule {part.allocation} comes no nearer")


def details(result: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a result that the model's config.json keeps: how the model was compressed."""
    return {key: result[key] for key in ("method", "target", "weighting", "allocation")}


def write(folder: RunDir, table: list[dict[str, Any]], result: dict[str, Any], *, plots: bool) -> None:
    """The files of a result beside its model."""
    write_json(folder.path / "result.json", result)
    if not table:
        return
    write_json(folder.path / "ranks.json", table)
    with (folder.path / "ranks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    show(table)
    if plots:
        from lowrank_cli.compress import pictures

        folder.plots.mkdir(exist_ok=True)
        kept = {row["name"]: row["rank"] / row["full_rank"] for row in table if "rank" in row}
        dense = {row["name"] for row in table if row["role"] == "N-LRC"}
        pictures.rank_map(folder.plots / "rank_map.png", kept, dense)


def show(table: Sequence[dict[str, Any]]) -> None:
    """One line for each kind of matrix; the experts of a layer count as one."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        if "rank" in row:
            kinds.setdefault(row["name"].removesuffix(".weight").rpartition(".")[2], []).append(row)
    lines = []
    for kind, members in kinds.items():
        low = [row for row in members if row["role"] == "LRC"]
        ranks = f"{min(r['rank'] for r in low)} to {max(r['rank'] for r in low)}" if low else ""
        shapes = {by([r[side] for side in ("experts", "out", "in") if r[side] is not None]) for r in members}
        after, before = (sum(r[key] for r in members) for key in ("parameters_after", "parameters_before"))
        lines.append([kind, len(members), ", ".join(sorted(shapes)), len(low), ranks, f"{100 * after / before:.0f} %"])
    console.table(
        "Low-rank components",
        ["matrices", "count", "shape", "low-rank", "ranks", "parameters"],
        lines,
        right=(1, 3, 5),
    )


def by(shape: Sequence[int]) -> str:
    """A shape as people write it."""
    return " x ".join(map(str, shape))


def summary(result: dict[str, Any]) -> str:
    """The result as a few lines for people."""
    before, after = result["parameters_before"], result["parameters_after"]
    parts = [f"{console.human_count(before)} -> {console.human_count(after)} parameters"]
    sizes = " -> ".join(console.human_bytes(result[key]) for key in ("bytes_before", "bytes_after"))
    if "linear_parameter_share" in result:
        parts[0] += (
            f" ({100 * result['linear_parameter_share']:.1f} % of the matrices', "
            f"{100 * result['rank_reduction']:.1f} % of the rank cut, "
            f"{result['low_rank_components']} of {result['linears']} matrices low-rank)"
        )
    if "perplexity_before" in result:
        parts += [
            f"perplexity {result['perplexity_before']:.2f} -> {result['perplexity_after']:.2f} "
            f"({result['evaluation_text']}, {result['evaluated_tokens_after']:,} tokens)",
            *other_kind(result),
            f"{result['tokens_per_second_before']:,.0f} -> {result['tokens_per_second_after']:,.0f} tokens/s forward",
        ]
    return "\n".join([*parts, f"model: {sizes}: {result['model']}"])


def other_kind(result: dict[str, Any]) -> list[str]:
    """Return the line about the text of another kind, if it was measured on one."""
    if "other_perplexity_before" not in result:
        return []
    before, after = result["other_perplexity_before"], result["other_perplexity_after"]
    return [f"perplexity {before:.2f} -> {after:.2f} ({result['other_text']}, a text of another kind)"]


def warn_of_loss(result: dict[str, Any], part: Method) -> None:
    """Warn of a perplexity that more than doubled, with what to try next."""
    for key, text in (("perplexity", "evaluation_text"), ("other_perplexity", "other_text")):
        before, after = (result.get(f"{key}_{when}") for when in ("before", "after"))
        if before is not None and after > LOST * before:
            console.warn(
                f"the perplexity on {result[text]} is {after / before:.1f} times what it was: cut less "
                f"({part.flag('param_budget')}), give {part.flag('calibrate')} text of that kind, or train what was "
                f"left: lowrank finetune --method {part.name} --model {result['run']}"
            )
            return
