"""The settings that every command has, and what concerns one call only."""

from dataclasses import dataclass

from lowrank_cli.fields import option


@dataclass(frozen=True)
class CommonConfig:
    """Run"""

    seed: int = option(0, "of the weights, the data order and every random draw", min=0, max=2**64 - 1)
    device: str = option("auto", "cpu, cuda or cuda:1; auto takes a GPU if there is one")
    offline: bool = option(False, "never touch the network")


@dataclass(frozen=True)
class SourceConfig:
    """Model"""

    name: str | None = option(
        None, "Hugging Face folder, run folder, compressed model, .gguf file or hub id; the newest run", flag="model"
    )
    dtype: str = option(
        "auto",
        "of the weights; auto is bfloat16 on a GPU that has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    # what the settings of training have besides: here no option
    model_config: str | None = None
    continue_from: str | None = None
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Call:
    """This call"""

    config: str | None = option(None, "YAML file; flags win over it")
    out: str | None = option(None, "folder of the result; runs/DATE-COMMAND-MODEL unless given")
    dry_run: bool = option(False, "print what would be done, then stop")
    print_config: bool = option(False, "print the resolved configuration as YAML and stop")
    json: bool = option(False, "print one JSON object on stdout and nothing else there")
    debug: bool = option(False, "show tracebacks")
    quiet: bool = option(False, "only errors and the result", flag="quiet/-q")
    verbose: bool = option(False, "more detail", flag="verbose/-v")


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
