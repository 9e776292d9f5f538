"""The architecture to pretrain: from a preset or a JSON file to a Transformers configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from lowrank_cli import foreign
from lowrank_cli.errors import MissingError, UsageError, unknown
from lowrank_cli.models import presets
from lowrank_cli.models.kinds import DECODERS, refuse_kind
from lowrank_cli.settings.training import ModelConfig

# written by the program that saved the file; ours are set by the tokenizer, the flags or the installed Transformers
_NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"),
}


def build_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    max_length: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PretrainedConfig:
    """The configuration of a model to pretrain: a preset, or a JSON file for any causal language model.

    A file may be GaLore's (`LLaMAForCausalLM`, `max_sequence_length`, `pad_token_id: -1`) or any `config.json` whose
    model_type Transformers knows.

    Args:
        model: its `name` is the preset, or its `model_config` the file.
        vocab_size: entries of the tokenizer; what the preset or file says does not count.
        bos_token_id: of the tokenizer, like the next two.
        eos_token_id: as above.
        pad_token_id: as above; left out where it is the bos or eos token as well.
        max_length: tokens in a sequence; the positions are at least as many.
    Raises:
        UsageError: no such preset or file, not JSON, an architecture that is unknown or does not fit together.
    """
    raw, where = _read(model)
    model_type = raw.pop("model_type")
    positions = raw.pop("max_sequence_length", None)
    if positions is not None:
        raw.setdefault("max_position_embeddings", positions)
    raw = {key: value for key, value in raw.items() if key not in _NOT_ARCHITECTURE}
    # Transformers freezes the embedding row of the padding token: a document's end would never be learned
    pad = None if pad_token_id in (bos_token_id, eos_token_id) else pad_token_id
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad}
    _check_heads(raw, where, "head_dim" in raw)
    try:
        config = AutoConfig.for_model(model_type, **raw, **tokens, vocab_size=vocab_size)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip().partition("Error: ")
        reason = reason[2] or reason[0]
        raise UsageError(f"{where} does not describe a model: {reason}", "mend that value in the file") from None
    refuse_kind(config, where, causal=True)
    # once more with the names and defaults of the architecture: n_embd and n_head of gpt2
    shape = {key: getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    _check_heads(shape, where, "head_dim" in raw)
    if isinstance(activation := getattr(config, "hidden_act", None), str) and activation not in ACT2FN:
        raise unknown("activation", activation, ACT2FN, where)
    # an architecture without a bound, such as bloom, has no such setting
    if isinstance(bound := getattr(config, "max_position_embeddings", None), int):
        config.max_position_embeddings = max(bound, max_length)
    return config


def _read(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """The raw configuration, and what to call it in an error."""
    if model.model_config is not None:
        if model.name is not None:
            raise UsageError(
                f"--model {model.name} and --model-config {model.model_config} both name an architecture",
                "leave one of them out",
            )
        raw = _read_json(Path(model.model_config))
        _check_model_type(raw, model.model_config)
        return raw, model.model_config
    if model.name is None:
        raise UsageError("no architecture to pretrain", "add --model llama-9m or --model-config FILE")
    if model.name not in presets.names() and ("/" in model.name or Path(model.name).exists()):
        raise UsageError(
            f"--model {model.name} is not a preset, and pretraining starts from one",
            f"to start from its weights: --continue-from {model.name}; presets: {', '.join(presets.names())}",
        )
    return presets.get(model.name), f"preset {model.name}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return foreign.read_json(path.expanduser(), hint='it is an object: {"model_type": ...}')
    except MissingError:
        raise UsageError(
            f"cannot read --model-config {path}: no such file",
            f"give a JSON file, or a preset with --model: {', '.join(presets.names())}",
        ) from None


def _check_model_type(raw: dict[str, Any], where: str) -> None:
    causal = sorted(name for name, cls in CONFIG_MAPPING.items() if cls in MODEL_FOR_CAUSAL_LM_MAPPING)
    model_type = raw.get("model_type")
    if model_type is None:
        named = " ".join(map(str, raw.get("architectures") or ())).lower()
        guess = max((name for name in causal if named.startswith(name)), key=len, default="llama")
        raise UsageError(f"{where} has no model_type", f'add "model_type": "{guess}" to the file')
    if model_type in causal:
        return
    if model_type in CONFIG_MAPPING:
        raise UsageError(
            f"{where}: {model_type} has no causal language model in Transformers",
            DECODERS,
        )
    raise unknown("model_type", str(model_type), causal, where)


def _check_heads(shape: Mapping[str, Any], where: str, has_head_dim: bool) -> None:
    """Raise UsageError for numbers of heads that most architectures reject only while the model is built, or runs."""
    hidden, heads, shared = map(shape.get, ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if not (isinstance(hidden, int) and isinstance(heads, int)):
        return
    if hidden < 1 or heads < 1:
        raise UsageError(f"{where}: hidden size {hidden} with {heads} attention heads", "both are at least 1")
    if hidden % heads and not has_head_dim:
        near = next(n for n in range(min(heads, hidden), 0, -1) if hidden % n == 0)
        raise UsageError(
            f"{where}: {heads} attention heads do not divide the hidden size of {hidden}",
            f"take {near} heads, or a hidden size of {heads * max(1, round(hidden / heads))}",
        )
    if isinstance(shared, int) and shared > 0 and heads % shared:
        raise UsageError(
            f"{where}: {shared} key-value heads do not divide {heads} attention heads",
            "set num_key_value_heads to a divisor of num_attention_heads",
        )


# architectures that count positions from behind the padding token's id
_OFFSET = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "data2vec-text",
           "ibert", "longformer", "esm", "mpnet", "luke"}  # fmt: skip


def positions(config: PretrainedConfig) -> int | None:
    """Return how many tokens a sequence may have; None where the architecture sets no bound."""
    config = config.get_text_config()
    bound = getattr(config, "max_position_embeddings", None)
    if not isinstance(bound, int) or bound < 1:
        return None
    return bound - (config.pad_token_id or 0) - 1 if config.model_type in _OFFSET else bound


def check_length(config: PretrainedConfig, length: int, what: str = "sequences") -> None:
    """Raise UsageError if a model has no positions for so many tokens: learned ones end, turned ones are untrained."""
    bound = positions(config)
    if bound is not None and length > bound:
        raise UsageError(
            f"{what} of {length} tokens are too long for a model of {bound} positions", f"take --max-length {bound}"
        )
