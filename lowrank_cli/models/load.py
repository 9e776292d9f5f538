"""Load a causal language model: random weights from a configuration, or weights from a folder, a run or the hub."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from lowrank_cli import foreign
from lowrank_cli.errors import LowrankError, MissingError, UsageError
from lowrank_cli.misfortune import explained
from lowrank_cli.models import quantized
from lowrank_cli.models.architecture import build_config, check_length, positions
from lowrank_cli.models.causality import refuse_lookahead
from lowrank_cli.models.devices import device_of, dtype_of
from lowrank_cli.models.kinds import language_model_of, refuse_kind
from lowrank_cli.models.layers import freeze_outside_text
from lowrank_cli.models.source import Source, locate, tokenizer_of
from lowrank_cli.models.tying import apart
from lowrank_cli.ops.finite import refuse_non_finite
from lowrank_cli.run import is_language_model
from lowrank_cli.settings.common import SourceConfig
from lowrank_cli.settings.training import ModelConfig

__all__ = [
    "Head",
    "build_config",
    "check_length",
    "check_vocabulary",
    "config_of",
    "device_of",
    "dtype_of",
    "labels_of",
    "load",
    "meta",
    "positions",
    "tokenizer_of",
]

# checkpoints round the vocabulary up for the hardware; more than this is another tokenizer
PADDED_VOCABULARY = 1.02
# what only the pretraining of an encoder has, also where it is loaded as a decoder
LEFT_BEHIND = ("cls.seq_relationship.", "pooler.dense.")
_CLASSIFIER = "ForSequenceClassification"


def load(
    model: ModelConfig | SourceConfig,
    *,
    config: PretrainedConfig | None,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    offline: bool,
    head: Head | None = None,
    quantize: str | None = None,
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
        head: a classification head instead of the language model's.
        quantize: keep the layers' linears in 4 bits, frozen: nf4 or fp4, through bitsandbytes.
    Raises:
        UsageError: not a causal language model, by its type or by what its logits depend on, or weights that do not
            fit its configuration.
        MissingError: no such model.
        ValueError: a configuration and weights to continue from.
    """
    if config is not None and model.continue_from is not None:
        raise ValueError(f"a configuration for random weights, and weights to continue from: {model.continue_from}")
    if config is not None:
        net, name = _draw(config, dtype, seed), f"a {config.model_type} of this configuration"
    else:
        options = {}
        if quantize is not None:
            options = _quantization(quantize, dtype, device)
        source = locate(model, offline=offline)
        net, name = load_weights(source, dtype, head=head, **options), source.name
    for module in net.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # a weight that is repacked in the first evaluation passes no gradient on in the updates after it
            module.support_avx512bf16_for_cpu = False
    prepare(net, model.activation_checkpointing)
    net = net if quantize else net.to(device)
    if head is None:
        refuse_lookahead(net, name)
    return net


def prepare(net: PreTrainedModel, activation_checkpointing: bool) -> None:
    """Train mode, no key-value cache, activations recomputed in backward if asked for."""
    net.config.use_cache = False
    if activation_checkpointing:
        if not net.supports_gradient_checkpointing:
            raise UsageError(
                f"{net.config.model_type} cannot recompute activations", "leave out --activation-checkpointing"
            )
        # the newer name; the older one warns where both exist
        enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    net.train()


def meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the meta device: shapes and names of every tensor, no memory."""
    with torch.device("meta"):
        return _from_config(config, dtype)


def config_of(model: ModelConfig, *, offline: bool) -> PretrainedConfig:
    """The configuration of the weights that `load` would take, without loading them; raises as `load` does."""
    source = locate(model, offline=offline)
    config = _configuration(source)
    _look(source, config)
    return config


def labels_of(source: Source) -> int:
    """Return how many labels the head of a classifier has; 0 for a language model, and for an adapter of one."""
    folder = source.location if source.adapter is None else source.adapter
    if source.gguf is not None or (source.adapter is not None and is_language_model(Path(folder))):
        return 0
    config = _configuration(source, folder, local_files_only=source.is_local)
    classifies = source.adapter is not None or any(_CLASSIFIER in name for name in config.architectures or ())
    return config.num_labels if classifies else 0


def _configuration(source: Source, folder: str | Path | None = None, **options: Any) -> PretrainedConfig:
    """The configuration of a place, or of a folder that belongs to it; raises UsageError for unsupported kinds."""
    with _readable_errors(source), _quiet():
        config = foreign.from_pretrained(AutoConfig, folder or source.location, **(options or source.arguments))
    refuse_kind(config, source.name)
    return config


def _look(source: Source, config: PretrainedConfig) -> None:
    """Raise UsageError for weights that are codes, or an index that leads out of its folder, before any are read."""
    is_folder = source.is_local and source.gguf is None
    raw = foreign.check_model(Path(source.location)) if is_folder else {} if source.gguf else config.to_dict()
    quantized.refuse_codes(raw, source.location)


def check_vocabulary(model: PreTrainedModel, tokenizer: Sized, *, training: bool = True) -> None:
    """Raise UsageError unless the tokenizer's entries are those of the model's embedding.

    The embedding may have up to 2 % more rows than the tokenizer has entries: many checkpoints round it up. Who only
    reads with the model may have more of them, and some entries without a row, such as a padding token that was added
    later: a text that has one of those is refused when it comes.
    """
    rows, entries = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if entries <= rows and (rows <= entries * PADDED_VOCABULARY or not training):
        return
    if not training and entries <= rows * PADDED_VOCABULARY:

        def look(_, arguments: tuple) -> None:
            if (largest := int(arguments[0].max())) >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise UsageError(
                    f"the text has the token {token!r}, and the model has no row for it",
                    "leave such texts out, or put the tokenizer that the model was trained with into its folder",
                )

        model.get_input_embeddings().register_forward_pre_hook(look)
        return
    raise UsageError(
        f"the model has a vocabulary of {rows} and the tokenizer one of {entries}",
        "leave out --tokenizer to take the model's own, or give the tokenizer that it was trained with"
        if training
        else "put the tokenizer that it was trained with into its folder",
    )


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
    refuse_kind(config, "the model", causal=True)
    auto, mapping = language_model_of(config)
    try:
        net = auto.from_config(config, dtype=dtype, attn_implementation=_attention(config, mapping))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if explained(error):
            raise
        raise UsageError(
            f"Transformers cannot build this {config.model_type}: {_last_line(error)}",
            "mend the model's configuration; --debug shows where it failed",
        ) from error
    freeze_outside_text(net)
    return net


def load_weights(source: Source, dtype: torch.dtype, *, head: Head | None = None, **options: Any) -> PreTrainedModel:
    """The weights of a place, on the CPU, with its adapter merged if it has one.

    Args:
        source: the place.
        dtype: of the parameters.
        head: a classification head instead of the language model's; one that the weights do not hold is drawn new.
        options: for `from_pretrained`.
    Raises:
        UsageError, MissingError, LowrankError: as `load`.
    """
    if head is None and labels_of(source):
        raise UsageError(
            f"{source.name} is a classifier: its head gives labels, and a language model's head is not there",
            f"score its own task with: lowrank eval TASK --model {source.name}; or give a language model",
        )
    labels = {} if head is None else head.arguments
    # the bar of the conversion from GGUF goes to stderr whatever the logging level
    silent = redirect_stderr(io.StringIO()) if source.gguf else nullcontext()
    with silent:
        config = _configuration(source, **source.arguments, **labels)
    refuse_kind(config, source.name, causal=head is None)
    auto, mapping = AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if head is None:
        auto, mapping = language_model_of(config)
    _look(source, config)
    if source.gguf is None:
        options = quantized.dequantizing(config.to_dict()) | options
    with _readable_errors(source), _quiet(), silent:
        net, report = foreign.from_pretrained(
            auto,
            source.location,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config, mapping),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them
            **source.arguments,
            **options,
        )
    if source.gguf is not None:
        # dequantized on loading: what is left of the quantization would only keep it from being saved
        net.config.__dict__.pop("quantization_config", None)
        net.hf_quantizer = None
    _check_report(source.name, net, report, head)
    # an adapter has to train and save these with it
    net.newly_drawn = frozenset(report["missing_keys"])
    net = net if source.adapter is None else _merged(net, source)
    refuse_non_finite(source.name, net.named_parameters())
    freeze_outside_text(net)
    return net


def _check_report(name: str, net: PreTrainedModel, report: Mapping[str, Any], head: Head | None) -> None:
    """Raise UsageError for tensors that are not there, or that the model has no place for."""
    kind, body = net.config.model_type, f"{net.base_model_prefix}."
    new = set() if head is None else {key.partition(".")[0] for key, _ in net.named_parameters()} - {body[:-1]}
    found = {  # problem: tensors
        f"{name} lacks {{}} of the tensors of a {kind} model, such as {{}}": [
            key for key in report["missing_keys"] if key.partition(".")[0] not in new and ".pooler." not in f".{key}"
        ],
        f"{name} has another shape for {{}} of the tensors of a {kind} model, such as {{}}": [
            key for key, *_ in report["mismatched_keys"] if key.partition(".")[0] not in new
        ],
        f"{name} has {{}} tensors that a {type(net).__name__} has no place for, such as {{}}": [
            key
            for key in report["unexpected_keys"]
            # a language model's head is left for a classifier's
            if not any(part in key for part in LEFT_BEHIND) and (head is None or key.startswith(body))
        ],
    }
    for problem, keys in found.items():
        if keys:
            kind = "causal language model" if head is None else "model"
            raise UsageError(
                problem.format(len(keys), min(keys)), f"its weights and its config.json are not of the same {kind}"
            )


def _quantization(quantize: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """QLoRA's settings (arXiv:2305.14314): 4-bit weights with quantized scales, products in the run's dtype."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingError("--quantize needs bitsandbytes", "pip install 'lowrank-cli[8bit]'") from None
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def _merged(net: PreTrainedModel, source: Source) -> PreTrainedModel:
    """The model with a PEFT adapter merged into it."""
    from peft import PeftModel

    folder = Path(source.adapter)
    fits = f"an adapter of its base model {source.location}"
    with foreign.reading(folder, fits, "give the folder of the base model that it was trained on"):
        rows = _rows(net, folder)
        if rows != net.get_input_embeddings().num_embeddings:
            # the adapter was trained with tokens of its own
            net.resize_token_embeddings(rows, mean_resizing=False)
        with warnings.catch_warnings(), apart(net):
            # what PEFT warns of is done here, but for this: what the file has is for other modules
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Found missing adapter keys")
            merged = foreign.from_pretrained(PeftModel, net, model_id=source.adapter).merge_and_unload()
    return merged.requires_grad_(True)


def _rows(net: PreTrainedModel, folder: Path) -> int:
    """The rows of the embedding that an adapter was trained with: those that it saves, or its tokenizer's entries."""
    rows = net.get_input_embeddings().num_embeddings
    names = {module: name for name, module in net.named_modules()}
    ends = {names.get(module) for module in (net.get_input_embeddings(), net.get_output_embeddings())} - {None}
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        with foreign.open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 not a dict
                shape = tensors.get_slice(key).get_shape()
                if key.endswith(tuple(f"{end}.weight" for end in ends)):
                    return shape[0]
                if key.endswith(".lora_embedding_A"):
                    return shape[1]
    if (folder / "tokenizer.json").is_file():
        # the base may have more rows than its own tokenizer has entries
        return max(rows, len(foreign.from_pretrained(AutoTokenizer, folder, local_files_only=True)))
    return rows


@dataclass(frozen=True)
class Head:
    """A classification head: one score for each label, or one number for a regression."""

    labels: tuple[str, ...]
    regression: bool = False
    pad_token_id: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the model's configuration."""
        names = dict(enumerate(self.labels or ("score",)))
        pad = {} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {v: k for k, v in names.items()},
            "problem_type": "regression" if self.regression else "single_label_classification",
            **pad,
        }


def _attention(config: PretrainedConfig, mapping=MODEL_FOR_CAUSAL_LM_MAPPING) -> str:
    """PyTorch's fused attention where the architecture has it, else the plain one; never one that a file names, which
    may be a kernel to be fetched and run."""
    cls = mapping.get(type(config), None)
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


@contextmanager
def _readable_errors(source: Source) -> Iterator[None]:
    """Turn what Transformers and safetensors raise for a model that they cannot load into errors of ours."""
    where = source.name
    try:
        yield
    except ImportError as error:
        raise MissingError(
            f"{where} needs a package that is not installed: {_last_line(error)}",
            "pip install 'lowrank-cli[gguf]'" if source.gguf else "install it",
        ) from None
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
    except LowrankError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        # a broken file makes Transformers raise anything
        if explained(error):
            raise
        reason = foreign.first_line(error)
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
