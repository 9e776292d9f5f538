"""The settings of `lowrank compress` and `lowrank svd-dump`."""

from dataclasses import dataclass

from lowrank_cli.fields import option


@dataclass(frozen=True)
class CompressConfig:
    """Compression"""

    format: str = option(
        "factored", "factored: loads after `import lowrank_cli`; dense: loads anywhere", choices=("factored", "dense")
    )
    dataset: str | None = option(
        None,
        "text that perplexity before and after is measured on, as --dataset of pretrain; a run's own validation text, "
        "or stdlib",
    )
    max_length: int | None = option(
        None, "tokens in a window of text; a run's own, or 512, or the model's positions if it has fewer", min=2
    )
    eval_tokens: int = option(50_000, "tokens of that text; 0 measures nothing", min=0, count=True)
    spectra: str | None = option(None, "singular values from an earlier svd-dump: its folder or a published .pt file")
    recover: str = option(
        "none",
        "train back what was lost, against the dense model: local, block after block; lrc, then all blocks together",
        choices=("none", "local", "lrc"),
    )
    allow_partial: bool = option(False, "compress also where less than half of the layers' parameters can be")
    plots: bool = option(True, "draw the map of ranks as plots/*.png")


@dataclass(frozen=True)
class SpectraConfig:
    """Spectra"""

    gradients: int = option(0, "windows of text whose mean gradient's singular values are taken too", min=0)
    dataset: str | None = option(None, "that text, as --dataset of pretrain; a run's own training text, or stdlib")
    max_length: int | None = option(
        None, "tokens in a window of text; a run's own, or 512, or the model's positions if it has fewer", min=2
    )
    published: bool = option(False, "write the layout of WeLore's published files too: singular_values.pt")
    plots: bool = option(True, "draw plots/*.png")
