"""The configuration of a run: frozen dataclasses whose fields become flags, YAML keys and documentation.

Every setting has one name everywhere. A run is configured, weakest first, by the defaults of `lowrank_cli.settings`,
the command's and the method's own defaults, a preset (``lowrank_cli/presets/NAME.yaml``), a YAML file and the flags.
The YAML is flat: plain settings at the top, a method's settings under the method's name.
"""

import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from lowrank_cli import foreign, methods
from lowrank_cli.errors import UsageError, unknown
from lowrank_cli.fields import coerce, key_of
from lowrank_cli.run import RunDir
from lowrank_cli.settings import COMMANDS
from lowrank_cli.settings.common import CommonConfig, SourceConfig
from lowrank_cli.settings.compress import CompressConfig, SpectraConfig
from lowrank_cli.settings.evaluate import HarnessConfig
from lowrank_cli.settings.finetune import TaskConfig
from lowrank_cli.settings.training import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

# settings, each with where it was set
Values = dict[str, tuple[Any, str]]
# settings that name a file, a folder or a hub id, by field
LINKED = ("name", "model_config", "continue_from", "tokenizer")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result; ``config.yaml`` of a run folder is this, flat.

    A section that the command does not have is None.
    """

    command: str
    method: str
    methods: dict[str, Any]
    model: ModelConfig | SourceConfig
    common: CommonConfig
    data: DataConfig | None = None
    optim: OptimConfig | None = None
    train: TrainConfig | None = None
    eval: EvalConfig | None = None
    task: TaskConfig | None = None
    compress: CompressConfig | None = None
    spectra: SpectraConfig | None = None
    harness: HarnessConfig | None = None

    def flat(self) -> dict[str, Any]:
        """The YAML form: plain settings, then one mapping for each method."""
        flat = {"command": self.command, "method": self.method}
        for section, cls in COMMANDS[self.command].sections.items():
            part = getattr(self, section)
            flat |= {key_of(f): getattr(part, f.name) for f in offered(self.command, cls)}
        if not self.method:
            del flat["method"]
        own = {name: {key_of(f): getattr(part, f.name) for f in fields(part)} for name, part in self.methods.items()}
        return flat | {name: settings for name, settings in own.items() if settings}


def newest_run(command: str) -> Path | None:
    """The run whose model a command takes without --model: for fine-tuning a plain one: adapters do not stack."""
    return RunDir.newest_with_model(plain=command == "finetune")


def offered(command: str, cls) -> list:
    """The fields of a section that are settings of this command."""
    hidden = COMMANDS[command].hidden
    return [f for f in fields(cls) if f.metadata and key_of(f) not in hidden]


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
    spec = COMMANDS[command]
    merged, own = _merged(_layers(given, preset, config_file), given, method_given)
    if merged.get("command", (command,))[0] != command:
        raise UsageError(
            f"{config_file or preset} is for `lowrank {merged['command'][0]}`, not `lowrank {command}`",
            f"type: lowrank {merged['command'][0]} --config {config_file}",
        )
    method, parts = _methods(command, merged)
    _check_keys(command, merged, parts)
    _unlink(command, merged)
    _fill(command, merged, own, parts, _model(command, merged))
    unused = {name for name, values in own.items() if values} - {p.name for p in parts}
    if unused:
        name = sorted(unused)[0]
        raise UsageError(f"settings of {name} are given, but the method is {method}", f"add --method {name}")

    sections = {name: build(cls, merged) for name, cls in spec.sections.items()}
    configs = {p.name: build(p.Config, own.get(p.name, {}), kind=f"setting of {p.name}") for p in parts}
    run = RunConfig(command=command, method="+".join(p.name for p in parts), methods=configs, **sections)
    for part in parts:
        method = part(configs[part.name])
        method.refuse(run)
        method.check(run)
        method.refuse_unused(run, frozenset(k for k, v in method_given.get(part.name, {}).items() if v is not None))
    return run


def _layers(given: dict[str, Any], preset: str | None, config_file: str | None) -> list[tuple[dict[str, Any], str]]:
    """Return the files' settings, the weakest first, each with its name; those of a method that is replaced go."""
    layers = []
    if preset is not None:
        layers.append((foreign.read_yaml(preset_path(preset)), f"preset {preset}"))
    if config_file is not None:
        if not Path(config_file).expanduser().is_file():
            raise UsageError(f"no file {config_file}", "give --config the path of a YAML file")
        layers.append((foreign.read_yaml(Path(config_file).expanduser()), config_file))
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
    return layers


def _merged(
    layers: list[tuple[dict[str, Any], str]], given: dict[str, Any], method_given: dict[str, dict[str, Any]]
) -> tuple[Values, dict[str, Values]]:
    """Return plain settings and each method's own, the strongest value of each with where it was set."""
    merged: Values = {}
    own: dict[str, Values] = {}
    plain = {
        key_of(f) for spec in COMMANDS.values() for cls in spec.sections.values() for f in fields(cls) if f.metadata
    }
    for layer, where in [*layers, ({k: v for k, v in given.items() if v is not None}, "")]:
        for key, value in layer.items():
            if isinstance(value, dict) and key not in plain:
                own.setdefault(methods.check_name(key), {}).update(
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
        own.setdefault(name, {}).update(
            {k: (v, f"--{name}-{k.replace('_', '-')}") for k, v in values.items() if v is not None}
        )
    return merged, own


def _methods(command: str, merged: Values) -> tuple[str | None, list[type[methods.Method]]]:
    """Return the method as it was named, and its parts; none for a command that has no methods."""
    spec = COMMANDS[command]
    method, where = merged.get("method", (spec.method, ""))
    if spec.method is None:
        return method, []
    if not isinstance(method, str):
        raise UsageError(f"{where} is {method!r}", f"methods: {', '.join(methods.names())}")
    return method, methods.compose(method, command)


def _check_keys(command: str, merged: Values, parts: list[type[methods.Method]]) -> None:
    """Raise UsageError for a setting that the command does not have, and for two that say the same thing."""
    spec = COMMANDS[command]
    known = {"command", "method"} | {key_of(f) for cls in spec.sections.values() for f in offered(command, cls)}
    for key, (_, where) in merged.items():
        if key not in known:
            raise unknown("setting", key, known | {p.name for p in parts}, where.partition(" in ")[2])
    task, dataset = (merged.get(key, (None, ""))[0] for key in ("task", "dataset"))
    if task not in (None, "text") and dataset not in (None, spec.defaults.get("dataset")):
        raise UsageError(
            f"--task {task} and --dataset {dataset} both say what to train on",
            "keep one of them; a task's files are found through --data-dir",
        )


def _unlink(command: str, merged: Values) -> None:
    """Put the place that a link leads to in its place."""
    for cls in COMMANDS[command].sections.values():
        for f in offered(command, cls):
            if f.name in LINKED and key_of(f) in merged:
                value, where = merged[key_of(f)]
                value = coerce(cls, f, value, where)
                merged[key_of(f)] = (value if value is None else unlinked(value), where)


def _model(command: str, merged: Values) -> Any:
    """Return the model, which is chosen where nobody names one: the preset of pretrain, else the newest run's."""
    model = merged.get("model", (None, ""))[0]
    if model is not None:
        return model
    if command == "pretrain":
        model = None if any(key in merged for key in ("model_config", "continue_from")) else "llama-9m"
    elif (newest := newest_run(command)) is not None:
        # by its own name, since runs/latest will point at another run soon
        model = str(newest)
    if model is not None:
        merged["model"] = (model, "--model")
    return model


def _fill(command: str, merged: Values, own: dict[str, Values], parts: list[type[methods.Method]], model: Any) -> None:
    """Add the defaults of the methods and of the command, which are weaker than what anybody has said."""
    for part in parts:
        for key, value in part.defaults_for(command).items():
            merged.setdefault(key, (value, f"default of {part.name}"))
        for key, value in part.presets.get(model, {}).items():
            own.setdefault(part.name, {}).setdefault(key, (value, f"{part.name}'s default for {model}"))
    if merged.get("per_layer", (False,))[0] is True:
        # a norm of all gradients is known when all are there, which is what --per-layer is against
        merged.setdefault("grad_clipping", (0.0, "default of --per-layer"))
    for key, value in COMMANDS[command].defaults.items():
        merged.setdefault(key, (value, f"default of {command}"))


def unlinked(path: str) -> str:
    """The path past its symbolic links, relative if it was: runs/latest points elsewhere once a new run begins."""
    given = Path(path)
    if not any(p.is_symlink() for p in (given, *given.parents)):
        return path
    return str(given.resolve()) if given.is_absolute() else os.path.relpath(given.resolve())


def build(cls, values: dict[str, tuple[Any, str]], kind: str = "") -> Any:
    """A section from `{key: (value, where it was set)}`; with `kind`, keys that it does not have are errors."""
    keys = {key_of(f): f for f in fields(cls) if f.metadata}
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


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as config.yaml has it."""
    import yaml

    return yaml.safe_dump(config.flat(), sort_keys=False)


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
    """Return the description of a preset for --help: the first line of its file, which is a comment."""
    return preset_path(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
