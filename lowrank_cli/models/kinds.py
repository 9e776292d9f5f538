"""Tell kinds of models by their configuration: the class to load, and those that there is no command for."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from lowrank_cli.errors import UsageError

DECODERS = "take a decoder such as llama, mistral, qwen2 or gpt2"


def refuse_kind(config: PretrainedConfig, name: str, *, causal: bool = False) -> None:
    """Raise UsageError for a configuration of a model that is neither a decoder nor an encoder.

    Args:
        config: the model's.
        name: what to call the model.
        causal: whether a causal language model is needed; else a model that classifies will do.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{name} is an encoder-decoder ({kind}), which no command of lowrank supports", DECODERS)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        if causal:
            raise UsageError(
                f"{name} is not a causal language model: Transformers has none of type {kind}",
                f"train it on a task with: lowrank finetune --task TASK; or {DECODERS}",
            )
        return
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or hasattr(config, "vision_config"):
        raise UsageError(f"{name} is a vision-language model of a type that is not supported ({kind})", DECODERS)
    raise UsageError(f"{name} is not a language model of a type that is supported ({kind})", DECODERS)


def language_model_of(config: PretrainedConfig) -> tuple[type, Mapping]:
    """The way to the class of a language model, and its classes by configuration.

    It is the class with towers for other inputs if the checkpoint is one of those: what is saved has them too.
    """
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if whole is not None and whole.__name__ in (config.architectures or ()):
        return AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
