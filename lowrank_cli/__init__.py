"""Low-rank training and compression of language models: the library behind the `lowrank` command."""

import sys
from importlib import import_module
from importlib.util import find_spec
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


class _Registration:
    """Teaches Transformers to load compressed models when it is imported: importing this package stays cheap.

    A finder of modules: it lets the usual ones find Transformers' table of quantizers, and adds ours to the table once
    it has run.
    """

    table = "transformers.quantizers.auto"
    looking = False

    def find_spec(self, fullname, path=None, target=None):
        """The module's own spec, whose loader registers afterwards; None for any other module."""
        if fullname != self.table or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module) -> None:
                run(module)
                self.register()

            spec.loader.exec_module = run_and_register
        return spec

    def register(self) -> None:
        """Add the quantizer to the table, which is imported by now; the module does that itself."""
        import_module("lowrank_cli.models.lowrank_quantizer")


_registration = _Registration()
if _registration.table in sys.modules:
    _registration.register()
elif not any(type(finder).__name__ == "_Registration" for finder in sys.meta_path):
    sys.meta_path.insert(0, _registration)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lowrank_cli' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
