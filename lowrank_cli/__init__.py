"""Low-rank training and compression of language models: the library behind the `lowrank` command."""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout commands/ and kernels/ stand beside the package; in a wheel they are inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "commands").is_dir():
    __path__.append(str(_root))

# Public names, imported on first use so that `lowrank --help` never pays for torch.
_PUBLIC = {
    "GaLoreAdafactor": "lowrank_cli.optim.adafactor",
    "GaLoreAdamW": "lowrank_cli.optim.adamw",
    "GaLoreAdamW8bit": "lowrank_cli.optim.adamw8bit",
}

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lowrank_cli' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
