"""Let Transformers save and load a model with low-rank linears.

The model's config.json has `quantization_config: {quant_method: lowrank, ranks: {name: r}, form: ...}`. With it
`from_pretrained` swaps the named linears and parameters of experts for low-rank ones before it reads the weights.
Importing this file registers the name; `import lowrank_cli` sees to it that it is imported with Transformers' own
table of quantizers.

A model with low-rank experts is saved under its code's own names: its publishers' have a tensor for each expert, and
there is none of a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_cli.errors import UsageError
from lowrank_cli.models.lowrank_experts import LowRankStack
from lowrank_cli.models.lowrank_linear import FORMS, low_rank_linears, replace

QUANT_METHOD = "lowrank"


@torch.no_grad()
def densify(model: nn.Module) -> None:
    """Put plain linears, and parameters of experts, in the place of the low-rank ones, and forget the quantization."""
    for name, module in low_rank_linears(model).items():
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, LowRankStack):
            setattr(model.get_submodule(parent), leaf, nn.Parameter(module.weight))
            continue
        weight, bias = module.weight, module.bias
        if module.was_conv1d:
            plain = Conv1D(module.out_features, module.in_features).to(weight)
            weight = weight.mT
        else:
            plain = nn.utils.skip_init(
                nn.Linear, module.in_features, module.out_features, bias=bias is not None, dtype=weight.dtype,
                device=weight.device
            )  # fmt: skip
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
        setattr(model.get_submodule(parent), leaf, plain)
    mark_dense(model)


def mark(model: nn.Module, details: Mapping[str, Any] | None = None) -> None:
    """Tell a model with low-rank linears how it is to be saved: its configuration gets the map of its ranks."""
    found = low_rank_linears(model)
    forms = {m.form for m in found.values() if not isinstance(m, LowRankStack)}
    config = LowRankConfig(
        ranks={name: m.rank for name, m in found.items()}, form=forms.pop() if forms else "factored", **(details or {})
    )
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config)
    model.quantization_method = QUANT_METHOD
    _keep_names(model)


def _keep_names(model: nn.Module) -> None:
    """Let `save_pretrained` leave the names of a model with low-rank experts as they are."""
    if any(isinstance(module, LowRankStack) for module in low_rank_linears(model).values()):
        model._weight_conversions = []


def mark_dense(model: nn.Module) -> None:
    """The opposite of `mark`."""
    for holder, key in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if key in vars(holder):
            delattr(holder, key)
    model.is_quantized = False
    if vars(model).get("_weight_conversions") == []:
        # none were used, or none were to be: Transformers finds those of the architecture
        del model._weight_conversions


class LowRankConfig(QuantizationConfigMixin):
    """A LowRankConfig is the `quantization_config` in the config.json of a compressed model.

    Args:
        ranks: rank by the name of the linear, or of the parameter of experts.
        form: "factored" or "pifa".
        details: how it was compressed, for people.
    """

    def __init__(self, ranks: Mapping[str, int] | None = None, form: str = "factored", details=None, **_: Any):
        self.quant_method = QUANT_METHOD
        self.ranks, self.form, self.details = dict(ranks or {}), form, dict(details or {})
        if form not in FORMS:
            raise UsageError(f"the model's config.json names a low-rank form '{form}'", f"forms: {', '.join(FORMS)}")


class LowRankQuantizer(HfQuantizer):
    """Swaps what the configuration names before Transformers reads the weights."""

    requires_calibration = True  # from_pretrained loads such models, it does not make them

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        for name, rank in self.quantization_config.ranks.items():
            try:
                replace(model, name, rank, self.quantization_config.form)
            except AttributeError:
                raise UsageError(
                    f"config.json gives {name} a rank, and a {model.config.model_type} model has no such weight",
                    "load the folder that was saved, with its own config.json",
                ) from None

    def _process_model_after_weight_loading(self, model, **kwargs):
        # the weights are ordinary ones in another shape: .float(), .half() and training work as they always do
        model.is_quantized = False
        _keep_names(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model, dtype=None):
        densify(model)
        return model

    def remove_quantization_config(self, model) -> None:
        """Called after `dequantize`."""
        mark_dense(model)


def _register() -> None:
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LowRankConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LowRankQuantizer


_register()
