"""The configuration of a run: frozen dataclasses whose fields become flags, YAML keys and documentation.

Every setting has one name everywhere. A run is configured, weakest first, by the defaults below, the method's own
defaults for the model, a preset (``lowrank_cli/presets/NAME.yaml``), a YAML file and the flags. The YAML is flat:
plain settings at the top, a method's settings under the method's name.
"""

import operator
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from lowrank_cli import methods
from lowrank_cli.errors import UsageError, unknown


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    choices: tuple = (),
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    below: float | None = None,
    count: bool = False,
) -> Any:
    """A configuration field.

    Args:
        default: the value without a flag; None means "worked out from the rest", which the help text explains.
        help: one line, shown by ``--help`` and in the docs.
        flag: the name on the command line and in YAML, if not the field's own.
        choices: the allowed values.
        min: the smallest allowed value.
        above: the value must be larger than this.
        max: the largest allowed value.
        below: the value must be smaller than this.
        count: accept 100K, 1.5M, 2B.
    """
    limits = {"min": min, "above": above, "max": max, "below": below}
    return field(
        default=default, metadata={"help": help, "flag": flag, "choices": choices, "count": count, "limits": limits}
    )


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    name: str | None = option(
        None,
        "preset (llama-9m ... llama-7b), local Hugging Face folder, run folder or hub id; pretrain takes llama-9m",
        flag="model",
    )
    model_config: str | None = option(None, "JSON file with a model configuration; GaLore's own files are understood")
    continue_from: str | None = option(None, "start from these weights: Hugging Face folder, run folder or hub id")
    dtype: str = option(
        "auto",
        "of the weights; auto is bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    activation_checkpointing: bool = option(False, "recompute activations in backward: less memory, a third slower")


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    dataset: str = option(
        "stdlib", "stdlib, a .txt .json .jsonl .json.gz .csv .parquet file, a folder of them, or a hub id (streamed)"
    )
    dataset_config: str | None = option(None, "configuration of a hub dataset, such as en")
    validation_dataset: str | None = option(
        None, "validation text, as --dataset; otherwise the dataset's own validation part, or every 20th document"
    )
    text_field: str = option("text", "the key or column that holds the text")
    streaming: bool = option(
        False,
        "read local files as a stream instead of tokenizing them whole into the cache; hub datasets always stream",
    )
    tokenizer: str | None = option(
        None,
        "local folder or file, or hub id; otherwise the model's own, or a byte-level "
        "BPE trained on the dataset once and cached",
    )
    vocab_size: int = option(4096, "entries of a tokenizer trained here", min=257)
    max_length: int = option(256, "tokens in a sequence", min=2)
    packing: str = option(
        "packed",
        "packed: documents joined and cut into full blocks; padded: one document a row, "
        "truncated and padded, as in the papers",
        choices=("packed", "padded"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    optimizer: str = option(
        "adamw", "the update rule; adamw8bit has 8-bit moments", choices=("adamw", "adamw8bit", "adafactor")
    )
    per_layer: bool = option(False, "update each tensor within backward and free its gradient at once")
    stochastic_rounding: bool = option(False, "round bfloat16 weights up or down at random, so that no update is lost")
    lr: float = option(1e-3, "peak learning rate", above=0)
    beta1: float = option(0.9, "decay of the first moment", min=0, below=1)
    beta2: float = option(0.999, "decay of the second moment", min=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", min=0)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", min=0)
    grad_clipping: float = option(0.0, "largest global gradient norm; 0 is off", min=0)
    scheduler: str = option(
        "cosine",
        "learning-rate schedule after the warm-up",
        choices=("linear", "cosine", "cosine_restarts", "constant"),
    )
    warmup_steps: int | None = option(None, "linear warm-up; a tenth of the run unless given", min=0)
    min_lr_ratio: float = option(0.1, "final learning rate as a share of the peak", min=0, max=1)
    num_cycles: int = option(4, "cycles of cosine_restarts", min=1)


@dataclass(frozen=True)
class TrainConfig:
    """Training"""

    max_steps: int | None = option(None, "optimizer updates", min=1)
    max_train_tokens: int | None = option(None, "stop after this many tokens, such as 100M", min=1, count=True)
    epochs: float | None = option(None, "passes over the dataset", above=0)
    batch_size: int = option(16, "sequences in one forward pass on one device", min=1)
    total_batch_size: int | None = option(
        None, "sequences in one update; more than a batch accumulates gradients", min=1
    )
    log_every: int = option(10, "updates between metric lines", min=1)
    save_every: int | None = option(None, "updates between checkpoints; a quarter of the run unless given", min=1)
    keep: int = option(2, "newest checkpoints to keep", min=1)
    plots: bool = option(True, "draw plots/*.png with every checkpoint and at the end")
    log: str = option("", "also log to: tensorboard, wandb, trackio; comma-separated")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    eval_every: int | None = option(None, "updates between evaluations; a tenth of the run unless given", min=1)
    eval_tokens: int = option(50_000, "validation tokens, such as 10M", min=1, count=True)


@dataclass(frozen=True)
class CommonConfig:
    """Run"""

    seed: int = option(0, "of the weights, the data order and every random draw", min=0, max=2**64 - 1)
    device: str = option("auto", "cpu, cuda or cuda:1; auto takes a GPU if there is one")
    offline: bool = option(False, "never touch the network")


@dataclass(frozen=True)
class Invocation:
    """This call"""

    preset: str | None = option(None, "a paper's recipe")
    config: str | None = option(None, "YAML file; flags win over it")
    out: str | None = option(None, "run folder; runs/DATE-COMMAND-METHOD-MODEL unless given")
    resume: str = option(
        "never", "auto (newest checkpoint of --out, or of the newest run), a checkpoint or run folder, or never"
    )
    dry_run: bool = option(False, "print the targeted tensors and the memory estimate, then stop")
    memory_budget: str | None = option(None, "such as 24GB: stop with exit code 3 when the estimate is larger")
    print_config: bool = option(False, "print the resolved configuration as YAML and stop")
    json: bool = option(False, "print one JSON object on stdout and nothing else there")
    debug: bool = option(False, "show tracebacks")
    quiet: bool = option(False, "only errors and the result", flag="quiet/-q")
    verbose: bool = option(False, "more detail", flag="verbose/-v")


LIMITS = {
    "min": (operator.ge, "at least"),
    "above": (operator.gt, "larger than"),
    "max": (operator.le, "at most"),
    "below": (operator.lt, "smaller than"),
}
# settings that name a file, a folder or a hub id, by field
LINKED = ("name", "model_config", "continue_from", "tokenizer")
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "common": CommonConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result; ``config.yaml`` of a run folder is this, flat."""

    command: str
    method: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    common: CommonConfig
    methods: dict[str, Any]

    def flat(self) -> dict[str, Any]:
        """The YAML form: plain settings, then one mapping for each method."""
        flat = {"command": self.command, "method": self.method}
        for section, cls in SECTIONS.items():
            part = getattr(self, section)
            flat |= {key_of(f): getattr(part, f.name) for f in fields(cls)}
        return flat | {name: asdict(part) for name, part in self.methods.items() if fields(part)}


def key_of(f) -> str:
    """The name of a field on the command line (with dashes) and in YAML (with underscores)."""
    return f.metadata["flag"].split("/")[0].replace("-", "_") or f.name


def base_type(cls, f) -> type:
    """The type of a field without its `| None`."""
    hint = get_type_hints(cls)[f.name]
    return next((t for t in get_args(hint) if t is not NoneType), hint)


def coerce(cls, f, value: Any, name: str) -> Any:
    """A value from a flag or YAML as the field's type, checked; raises UsageError with what is allowed."""
    if value is None:
        if f.default is None:
            return None
        raise UsageError(f"{name} is empty", f"give a value or leave {name} out; it is {f.default!r} then")
    kind, checks = base_type(cls, f), f.metadata
    try:
        if checks["count"]:
            value = parse_count(value)
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif kind is int:
            # not by way of float: a seed may be too large for one
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            value = int(value)
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
        else:
            # YAML reads an unquoted no as false and 2024-01-01 as a date
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError
            value = str(value)
    except (TypeError, ValueError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UsageError(f"{name} is {value!r}", f"{name} takes {wanted}: {checks['help']}") from None
    if checks["choices"] and value not in checks["choices"]:
        raise UsageError(f"{name} is {value!r}", f"{name} takes one of: {', '.join(map(str, checks['choices']))}")
    finite = not isinstance(value, float) or abs(value) < float("inf")
    for limit, (holds, words) in LIMITS.items():
        bound = checks["limits"][limit]
        if bound is not None and not (finite and holds(value, bound)):
            raise UsageError(f"{name} is {value}", f"{name} must be {words} {bound}")
    return value


def parse_count(value: Any) -> int:
    """A whole number, with K, M, B or T for thousands to trillions: '1.5M' is 1,500,000."""
    text = str(value).strip().replace(",", "").replace("_", "").upper()
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:], 1)
    number = float(text[:-1] if scale > 1 else text) * scale
    if number != int(number):
        raise ValueError(value)
    return int(number)


def parse_bytes(text: str) -> int:
    """'24GB' in bytes, units of 1024; raises UsageError otherwise."""
    units = {"TB": 2**40, "GB": 2**30, "MB": 2**20, "KB": 2**10, "T": 2**40, "G": 2**30, "M": 2**20, "K": 2**10}
    upper = text.strip().upper().replace("IB", "B")
    unit = next((u for u in units if upper.endswith(u)), "")
    try:
        return int(float(upper[: len(upper) - len(unit)]) * units.get(unit, 1))
    except (ValueError, OverflowError):
        raise UsageError(f"--memory-budget is {text!r}", "write it as 24GB or 800MB") from None


def resolve(
    command: str,
    given: dict[str, Any],
    method_given: dict[str, dict[str, Any]],
    *,
    preset: str | None = None,
    config_file: str | None = None,
) -> RunConfig:
    """The configuration of a run from its parts, checked.

    Args:
        command: the command's name; its presets and method choices follow from it.
        given: flags that were typed, by field key; `method` among them.
        method_given: the same for each method's own flags, by method.
        preset: name of a preset.
        config_file: YAML file.
    Returns:
        The frozen configuration: defaults < method's defaults < preset < YAML < flags.
    Raises:
        UsageError: an unknown key, method or preset, a value out of range, or settings that a method cannot have.
    """
    layers = []
    if preset is not None:
        layers.append((read_yaml(preset_path(preset)), f"preset {preset}"))
    if config_file is not None:
        layers.append((read_yaml(Path(config_file)), config_file))
    known = {"command", "method"} | {key_of(f) for cls in SECTIONS.values() for f in fields(cls)}
    merged, method_merged = {}, {}
    typed = given.get("method")
    for layer, where in layers:
        # --preset NAME --method full is the recipe's baseline: the settings of the method that it replaces go
        replaced = set() if typed is None else set(str(layer.get("method", typed)).split("+")) - set(typed.split("+"))
        for name in replaced:
            layer.pop(name, None)
        if replaced and where != config_file:
            # the recipe chose these for its method; who wrote them in a file of their own meant them
            for key in ("lr", "eps"):
                layer.pop(key, None)
    for layer, where in [*layers, ({k: v for k, v in given.items() if v is not None}, "")]:
        for key, value in layer.items():
            if isinstance(value, dict) and key not in known:
                method_merged.setdefault(methods.check_name(key), {}).update(
                    {k: (v, f"{key}.{k} in {where}") for k, v in value.items()}
                )
            elif key in methods.names():
                # nothing below the name: no settings
                if value is not None:
                    raise UsageError(
                        f"{key} in {where} is {value!r}", f"write the settings of {key} below it, indented, one a line"
                    )
            else:
                merged[key] = (value, f"{key} in {where}" if where else f"--{key.replace('_', '-')}")
    for name, values in method_given.items():
        method_merged.setdefault(name, {}).update(
            {k: (v, f"--{name}-{k.replace('_', '-')}") for k, v in values.items() if v is not None}
        )

    if merged.get("command", (command,))[0] != command:
        raise UsageError(
            f"{config_file or preset} is for `lowrank {merged['command'][0]}`, not `lowrank {command}`",
            f"type: lowrank {merged['command'][0]} --config {config_file}",
        )
    method, where = merged.get("method", ("full", ""))
    if not isinstance(method, str):
        raise UsageError(f"{where} is {method!r}", f"methods: {', '.join(methods.names())}")
    parts = methods.compose(method, command)
    for key, (_, where) in merged.items():
        if key not in known:
            raise unknown("setting", key, known | {p.name for p in parts}, where.partition(" in ")[2])

    for cls in SECTIONS.values():
        for f in fields(cls):
            if f.name in LINKED and key_of(f) in merged:
                value, where = merged[key_of(f)]
                value = coerce(cls, f, value, where)
                merged[key_of(f)] = (value if value is None else unlinked(value), where)
    model = merged.get("model", (None, ""))[0]
    if command == "pretrain" and model is None and not any(k in merged for k in ("model_config", "continue_from")):
        merged["model"], model = ("llama-9m", "--model"), "llama-9m"
    for part in parts:
        for key, value in part.defaults.items():
            merged.setdefault(key, (value, f"default of {part.name}"))
        for key, value in part.presets.get(model, {}).items():
            method_merged.setdefault(part.name, {}).setdefault(key, (value, f"{part.name}'s default for {model}"))
    unused = {name for name, values in method_merged.items() if values} - {p.name for p in parts}
    if unused:
        name = sorted(unused)[0]
        raise UsageError(f"settings of {name} are given, but the method is {method}", f"add --method {name}")

    sections = {name: build(cls, merged) for name, cls in SECTIONS.items()}
    configs = {p.name: build(p.Config, method_merged.get(p.name, {}), kind=f"setting of {p.name}") for p in parts}
    run = RunConfig(command=command, method="+".join(p.name for p in parts), methods=configs, **sections)
    for part in parts:
        part(configs[part.name]).check(run)
    return run


def unlinked(path: str) -> str:
    """The path past its symbolic links, relative if it was: runs/latest points elsewhere once a new run begins."""
    given = Path(path)
    if not any(p.is_symlink() for p in (given, *given.parents)):
        return path
    return str(given.resolve()) if given.is_absolute() else os.path.relpath(given.resolve())


def build(cls, values: dict[str, tuple[Any, str]], kind: str = "") -> Any:
    """A section from `{key: (value, where it was set)}`; with `kind`, keys that it does not have are errors."""
    keys = {key_of(f): f for f in fields(cls)}
    for key, (_, where) in values.items():
        if kind and key not in keys:
            raise unknown(kind, key, keys, where.partition(" in ")[2])
    return cls(
        **{
            f.name: coerce(cls, f, *values[key])
            for key, f in keys.items()
            if key in values and f.default is not MISSING
        }
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; raises UsageError with the line otherwise."""
    import yaml

    if not path.is_file():
        raise UsageError(f"no file {path}", "give --config the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}", "mend the file") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no settings", "write one `key: value` a line, such as `method: galore`")
    nested = [value for value in content.values() if isinstance(value, dict)]
    for key in (key for mapping in (content, *nested) for key in mapping):
        if not isinstance(key, str):
            raise UsageError(f"{path} has the key {key!r}, which is no setting's name", "mend the file")
    return content


def preset_path(name: str) -> Path:
    """The file of a preset; raises UsageError with the known names."""
    known = preset_names()
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


def preset_names() -> dict[str, Path]:
    """Every preset and its file."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def preset_summary(name: str) -> str:
    """What a preset is, for --help: the first line of its file, which is a comment."""
    return preset_path(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
