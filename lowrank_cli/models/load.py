"""Load a causal language model: random weights from a configuration, or weights from a folder, a run or the hub."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from lowrank_cli.config import ModelConfig
from lowrank_cli.errors import LowrankError, MissingError, UsageError, unknown
from lowrank_cli.models.architecture import build_config
from lowrank_cli.models.source import Source, locate, tokenizer_of

__all__ = [
    "build_config",
    "check_vocabulary",
    "config_of",
    "device_of",
    "dtype_of",
    "load",
    "meta",
    "tokenizer_of",
]

# checkpoints round the vocabulary up for the hardware; more than this is another tokenizer
PADDED_VOCABULARY = 1.02


def load(
    model: ModelConfig,
    *,
    config: PretrainedConfig | None,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    offline: bool,
) -> PreTrainedModel:
    """The model on the device, in train mode, without a key-value cache.

    Args:
        model: where the weights are (`continue_from` or `name`; the newest run without either), and whether to
            recompute activations.
        config: build this architecture with random weights instead.
        dtype: of the parameters. Buffers keep theirs: rotary frequencies lose positions in bfloat16.
        device: where to put it.
        seed: of random weights. They are drawn on the CPU in float32, so that they are the same on every device;
            the caller's random state is left as it is.
        offline: take hub models from the cache only.
    Raises:
        UsageError: not a causal language model, or weights that do not fit its configuration.
        MissingError: no such model.
        ValueError: a configuration and weights to continue from.
    """
    if config is not None and model.continue_from is not None:
        raise ValueError(f"a configuration for random weights, and weights to continue from: {model.continue_from}")
    net = _load_weights(locate(model, offline=offline), dtype) if config is None else _draw(config, dtype, seed)
    net.config.use_cache = False
    if model.activation_checkpointing:
        if not net.supports_gradient_checkpointing:
            raise UsageError(
                f"{net.config.model_type} cannot recompute activations", "leave out --activation-checkpointing"
            )
        # the newer name; the older one warns where both exist
        enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return net.to(device).train()


def meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device: shapes and names of every tensor, no memory."""
    with torch.device("meta"):
        return _from_config(config, dtype)


def config_of(model: ModelConfig, *, offline: bool) -> PretrainedConfig:
    """The configuration of the weights that `load` would take, without loading them; raises as `load` does."""
    source = locate(model, offline=offline)
    with _readable_errors(source):
        return AutoConfig.from_pretrained(source.location, local_files_only=source.is_local, trust_remote_code=False)


def check_vocabulary(model: PreTrainedModel, tokenizer: Sized) -> None:
    """Raise UsageError unless the tokenizer's entries are those of the model's embedding.

    The embedding may have up to 2 % more rows than the tokenizer has entries: many checkpoints round it up.
    """
    rows, entries = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if entries <= rows <= entries * PADDED_VOCABULARY:
        return
    raise UsageError(
        f"the model has a vocabulary of {rows} and the tokenizer one of {entries}",
        "leave out --tokenizer to take the model's own, or give the tokenizer that it was trained with",
    )


def dtype_of(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of a name; auto is bfloat16 on a GPU that computes in it, else float32."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        device = torch.device(device)
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in named:
        raise unknown("dtype", name, ["auto", *named], "--dtype")
    return named[name]


def device_of(name: str) -> torch.device:
    """The device of a name such as auto, cpu, cuda or cuda:1; raises UsageError if it is not on this machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}", "it takes auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count)) or f"no GPU that PyTorch {torch.__version__} can use"
        raise UsageError(f"there is no device {name} on this machine", f"here: cpu, {there}; --device auto chooses")
    return device


def _draw(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Random weights of the seed, on the CPU."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        net = _from_config(config, torch.float32)
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    net.config.dtype = dtype
    return net


def _from_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_attention(config))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"Transformers cannot build this {config.model_type}: {_last_line(error)}",
            "mend the model's configuration; --debug shows where it failed",
        ) from error


def _load_weights(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The weights of a place, on the CPU."""
    local = {"local_files_only": source.is_local, "trust_remote_code": False}
    with _readable_errors(source), _quiet():
        config = AutoConfig.from_pretrained(source.location, **local)
        net, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them
            **local,
        )
    for problem, keys in (("lacks", report["missing_keys"]), ("has another shape for", report["mismatched_keys"])):
        if keys:
            first = sorted(key if isinstance(key, str) else key[0] for key in keys)[0]
            raise UsageError(
                f"{source.location} {problem} {len(keys)} of the tensors of a {net.config.model_type} model, "
                f"such as {first}",
                "its weights and its config.json are not of the same causal language model",
            )
    return net


def _attention(config: PretrainedConfig) -> str | None:
    """PyTorch's fused attention where the architecture has it, else its own default."""
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else None


@contextmanager
def _readable_errors(source: Source) -> Iterator[None]:
    """What Transformers and safetensors raise for a model that they cannot load, as ours."""
    where = source.location
    try:
        yield
    except SafetensorError as error:
        raise LowrankError(
            f"the weights in {where} are damaged: {_last_line(error)}", "copy or save them again"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        if source.is_local:
            raise UsageError(
                f"{where} does not load: {reason}", "give a folder with a config.json and weights"
            ) from None
        raise MissingError(
            f"{where} is no folder here, and the hub did not give it: {reason}",
            f"check the name and the network; a private or gated model needs: hf auth login && hf download {where}",
        ) from None
    except (ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(
            f"{where} is not a causal language model that Transformers can load: {reason}",
            "take a decoder such as llama, mistral, qwen2 or gpt2, in safetensors",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of Transformers: what matters of it becomes an error of ours."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
