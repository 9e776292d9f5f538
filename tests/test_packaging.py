"""The wheel: what is in it, and that it lives beside Hugging Face's own `kernels` package."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, timeout=300)
    (found,) = folder.glob("lowrank_cli-*.whl")
    return found


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"lowrank_cli", next(t for t in top if t.endswith(".dist-info"))}
    for name in ("commands/pretrain.py", "kernels/README.md", "presets/galore-llama-60m.yaml", "methods/galore.py"):
        assert f"lowrank_cli/{name}" in names


def test_installed_wheel_lives_beside_another_kernels_package(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                               capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
    zipfile.ZipFile(wheel).extractall(site)
    # a package of that name, as Hugging Face's is, and the libraries of this environment behind it
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("__version__ = '0.11.1'\nNAME = 'the other one'\n")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    script = (
        "import kernels, transformers, lowrank_cli, lowrank_cli.commands.pretrain, lowrank_cli.kernels\n"
        "from transformers import LlamaForCausalLM\n"
        "from lowrank_cli.main import main\n"
        "assert kernels.NAME == 'the other one'\n"
        f"assert lowrank_cli.__file__.startswith({str(site)!r}), lowrank_cli.__file__\n"
        "assert main(['pretrain', '--method', 'galore', '--help']) == 0\n"
    )
    child = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
