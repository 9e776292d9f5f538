"""Weights that are codes: which are turned into numbers while a model is loaded, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_cli import foreign
from lowrank_cli.errors import UsageError

# what safetensors calls the types of plain weights
FLOATS = ("F64", "F32", "F16", "BF16")
# quantizations that Transformers undoes while it loads a model, and the one of our own compressed models
DEQUANTIZED, OURS = ("fp8", "mxfp4"), "lowrank"


def quantization(config: dict[str, Any]) -> str:
    """Return the method that a model's weights are quantized by, as its config.json says; "" for plain weights."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, dict):
        return "" if settings is None else foreign.kind_of(settings)
    bits = next((f"bitsandbytes, {n} bits" for n in (4, 8) if settings.get(f"load_in_{n}bit")), "")
    return bits or str(settings.get("quant_method") or "by a method that is not named")


def refuse_codes(config: dict[str, Any], folder: Path | str) -> None:
    """Raise UsageError for a model whose weights are codes that Transformers does not turn into numbers on loading.

    Args:
        config: its config.json.
        folder: where it is, or its id on the hub.
    """
    hint = "take the model that it was made from"
    method = quantization(config)
    if method and method not in (*DEQUANTIZED, OURS):
        raise UsageError(f"{folder} is quantized ({method}): its weights are codes, and their values are lost", hint)
    if method or not Path(folder).is_dir():
        return
    for path in foreign.weights_in(Path(folder)):
        if path.suffix != ".safetensors":
            continue
        with foreign.open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 not a dict
                kind = str(file.get_slice(name).get_dtype())
                if name.endswith(".weight") and kind not in FLOATS:
                    raise UsageError(
                        f"{folder} is quantized, and its config.json does not name how: {name} holds codes ({kind})",
                        hint,
                    )


def dequantizing(config: dict[str, Any]) -> dict[str, Any]:
    """Return what `from_pretrained` needs beside the location to load plain weights, on every device."""
    method = quantization(config)
    if method not in DEQUANTIZED:
        return {}
    from transformers import FineGrainedFP8Config, Mxfp4Config

    settings = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method]
    return {"quantization_config": settings(dequantize=True)}
