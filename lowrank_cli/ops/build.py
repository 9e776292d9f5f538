"""The compiled kernels of `kernels/`: built once for a machine by torch's extension builder, then loaded.

A library stands in torch's extension folder (TORCH_EXTENSIONS_DIR, else the user's cache) in a folder whose name is a
hash of everything it depends on, so that a stale one is never loaded. It is built beside and moved there when whole.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowrank_cli import console

SOURCES = {"cpu": ("bindings.cpp", "projection_cpu.cpp"), "cuda": ("bindings.cpp", "projection.cu")}
HEADERS = ("projection.h", "projection_cpu.h", "product.cuh")
# the library is for this machine alone: its processor is part of the folder's name
CPU_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-unknown-pragmas")
FLAGS = {"cpu": CPU_FLAGS, "cuda": ("-O3", "-DLOWRANK_CUDA")}
# what torch's builder and the loader raise when a compiler, a header or a library is not as it should be
FAILURES = (RuntimeError, OSError, ImportError, ValueError, subprocess.SubprocessError)

_loaded: set[str] = set()
_failed: dict[str, str] = {}


class BuildError(RuntimeError):
    """A kernel that could not be built or loaded; the message is the reason, in one line."""


def sources() -> Path:
    """The folder of the C++ and CUDA sources, in a checkout or inside the installed package."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


def library(kind: str) -> Path:
    """Return the path of the library of a kind ("cpu" or "cuda") for this machine and this torch, built or not."""
    digest = hashlib.sha256()
    for name in (*SOURCES[kind], *HEADERS):
        digest.update((sources() / name).read_bytes())
    digest.update(repr((FLAGS[kind], torch.__version__, sys.platform, _target(kind))).encode())
    name = f"lowrank_{kind}_{digest.hexdigest()[:16]}"
    return _root() / name / f"{name}.so"


def is_built(kind: str) -> bool:
    """Return whether `load` would find the library and build nothing."""
    return kind in _loaded or library(kind).is_file()


def is_loaded(kind: str) -> bool:
    """Return whether the ops run on this kernel in this process."""
    return kind in _loaded


def load(kind: str) -> None:
    """Registers the compiled ops, and builds their library first where it is not there.

    Two processes may build at once: one does, the other waits and loads. A build that was killed leaves nothing that
    a later one would wait for or load.

    Raises:
        BuildError: with the reason; the same one again in the same process, without another try.
    """
    if kind in _loaded:
        return
    if kind in _failed:
        raise BuildError(_failed[kind])
    try:
        path = library(kind)
        if path.is_file():
            torch.ops.load_library(str(path))
        else:
            _build(kind, path)
    except FAILURES as error:
        _failed[kind] = _reason(error)
        raise BuildError(_failed[kind]) from error
    _loaded.add(kind)


def _build(kind: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / "lock"):
        if path.is_file():
            # made by another process while this one waited
            torch.ops.load_library(str(path))
            return
        start = time.monotonic()
        console.note(f"building the {kind.upper()} kernel, once for this machine: {_usual(kind)}")
        # torch's builder waits for ever for the lock file of a build that was killed: it gets an empty folder
        work = path.parent / "build"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        from torch.utils import cpp_extension

        with _ninja_on_path():
            cpp_extension.load(
                name=path.stem,
                sources=[str(sources() / name) for name in SOURCES[kind]],
                extra_cflags=list(FLAGS[kind]),
                extra_cuda_cflags=["-O3"],
                extra_ldflags=["-fopenmp"] if kind == "cpu" else [],
                build_directory=str(work),
                with_cuda=kind == "cuda",
                is_python_module=False,
            )
        os.replace(work / path.name, path)
        shutil.rmtree(work, ignore_errors=True)
        console.note(f"built the {kind.upper()} kernel in {time.monotonic() - start:.0f} s")


def _usual(kind: str) -> str:
    return "about half a minute" if kind == "cpu" else "up to two minutes"


def _target(kind: str) -> str:
    """Return what the code is compiled for: CUDA's version and architectures, or the processor's instruction sets."""
    if kind == "cuda":
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if not archs and torch.cuda.is_available():
            archs = str(sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))
        return f"cuda {torch.version.cuda} {archs}"
    return f"{platform.machine()} {_instructions()}"


def _instructions() -> str:
    """The processor's instruction sets: a home folder may be shared by machines that differ in them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _root() -> Path:
    # as torch.utils.cpp_extension has it; that module takes half a second to import, and is for builds alone
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser() / "torch_extensions"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that goes with its process, however that ends."""
    try:
        import fcntl
    except ImportError:
        raise BuildError("kernels are built on Linux and macOS only") from None
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note("another process is building the kernel; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The folder of this Python's own programs on PATH: a pip-installed ninja is there, whether activated or not."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _reason(error: BaseException) -> str:
    """The line of an error that says what is wrong: the compiler's first complaint, else its own first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [line for line in lines if ("error:" in line or "not found" in line) and "Error building" not in line]
    said = (complaints or lines or [type(error).__name__])[0]
    return said if len(said) <= 200 else f"{said[:197]}..."
