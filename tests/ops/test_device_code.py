"""kernels/projection.cu without a GPU: what the compiler makes of it, and what it computes on an emulated one."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_cli.ops import build

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
# nvcc takes minutes, and is not everywhere
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc, whose headers the emulator takes")]
# two blocks of 256 threads have to fit into the 65,536 registers of a multiprocessor
MOST_REGISTERS = 128


def toolkit() -> Path:
    """Where the compiler's headers are: it may be a script that calls another one."""
    said = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    return Path(re.search(r"TOP=(\S+)", said.stderr)[1]).resolve()


def fingerprint(*files):
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:16]


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles_without_spills(arch, kernel_folder, tmp_path):
    source, *headers = (build.sources() / name for name in ("projection.cu", "product.cuh", "projection.h"))
    # a report lasts as long as the sources it is of
    report = kernel_folder / f"ptxas-{arch}-{fingerprint(source, *headers)}.txt"
    if not report.is_file():
        command = [NVCC, "-O3", "-std=c++17", "-c", str(source), "-o", str(tmp_path / "projection.o"),
                   "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        report.write_text(done.stderr)
    text = report.read_text()
    assert "warning" not in text
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", text)]
    # 3 dtypes: project with Adam, project and expand in 4 layouts each, 2 of Adam alone, 2 of VeLoRA
    assert len(spills) == len(registers) == 3 * (3 * 4 + 4)
    assert all(numbers == ("0", "0", "0") for numbers in spills)
    assert max(registers) <= MOST_REGISTERS


@pytest.fixture(scope="module")
def emulated(kernel_folder):
    """The CUDA op with its bindings, its device code run by emulated/emulator.h; built once for its sources."""
    parts = [*sorted(build.sources().glob("*.*")), *sorted((HERE / "emulated").glob("*.*"))]
    name = f"emulated_{fingerprint(*parts)}"
    folder = kernel_folder / name
    folder.mkdir(exist_ok=True)
    with build._locked(folder / "own_lock"):
        if not (folder / "whole").is_file():
            for path in folder.glob("lock"):
                path.unlink()
            compile_emulated(name, folder, toolkit() / "include")
            (folder / "whole").touch()
    return folder / f"{name}.so"


def compile_emulated(name, folder, include):
    script = (
        "import sys; from lowrank_cli.ops import fused_step; from torch.utils import cpp_extension as c; "
        "name, folder, *rest = sys.argv[1:]; "
        "c.load(name, rest[:2], extra_cflags=['-O2', '-w', '-DLOWRANK_CUDA', '-DLOWRANK_EMULATED'], "
        "extra_include_paths=rest[2:], build_directory=folder, is_python_module=False)"
    )
    files = [build.sources() / "bindings.cpp", HERE / "emulated" / "device.cpp"]
    includes = [build.sources(), HERE / "emulated", include]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-c", script, name, str(folder), *map(str, files), *map(str, includes)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_device_code_passes_every_test_of_the_op(emulated, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "--basetemp", str(tmp_path / "inner"),
               str(HERE / "test_fused_step.py")]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env["LOWRANK_TEST_KERNEL"] = str(emulated)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25


def test_the_cuda_library_links_and_loads_where_there_is_no_gpu(tmp_path):
    """Device code, launchers and bindings make one library that registers the CUDA side of the ops.

    By hand, since the builder of a torch without CUDA takes no CUDA sources.
    """
    device = tmp_path / "projection.o"
    command = [NVCC, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-c", str(build.sources() / "projection.cu"),
               "-o", str(device), "-gencode", "arch=compute_90,code=sm_90"]  # fmt: skip
    subprocess.run(command, check=True)
    script = (
        "import sys, torch; from lowrank_cli.ops import fused_step; from torch.utils import cpp_extension as c; "
        "folder, source, *flags = sys.argv[1:]; "
        "c.load('device', [source], extra_cflags=['-DLOWRANK_CUDA'], extra_ldflags=flags, build_directory=folder, "
        "is_python_module=False); "
        "print([torch._C._dispatch_has_kernel_for_dispatch_key('lowrank::' + op, 'CUDA') "
        "for op in ('galore_step_', 'velora_compress', 'velora_step_')])"
    )
    libraries = toolkit() / "lib64"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-c", script, str(tmp_path), str(build.sources() / "bindings.cpp"), str(device),
               f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lcudart"]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[True, True, True]"
