"""The loader of compiled kernels, in processes of its own: what a user without a compiler meets."""

import os
import subprocess
import sys
import time

import pytest

from lowrank_cli.ops import build

# a source that compiles in a second stands for the real ones: what is tested is the loader
TINY = """
import sys, pathlib
from lowrank_cli.ops import build, fused_step
folder = pathlib.Path(sys.argv[1])
build.SOURCES, build.HEADERS, build.sources = {"cpu": ("tiny.cpp",)}, (), lambda: folder
choice = fused_step.choose(sys.argv[2], "cpu")
print(choice)
print("loaded" if build.is_loaded("cpu") else "not loaded")
"""


@pytest.fixture
def tiny(tmp_path):
    """Starts a process that chooses a kernel whose source is one line; returns it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.cpp").write_text('extern "C" int tiny() { return 1; }\n')

    def start(kernel="cpu", script=TINY, **env):
        env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), **env}
        return subprocess.Popen(
            [sys.executable, "-c", script, str(folder), kernel], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    start.folder = folder
    start.extensions = tmp_path / "extensions"
    return start


def outcome(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines(), err


def test_the_first_use_builds_and_the_second_only_loads(tiny):
    out, err = outcome(tiny())
    assert out == ["kernel: cpu (as asked)", "loaded"]
    assert "building the CPU kernel, once for this machine" in err
    out, err = outcome(tiny(CXX="/bin/false"))
    assert (out[1], err) == ("loaded", "")


def test_a_changed_source_is_built_anew(tiny):
    outcome(tiny())
    (tiny.folder / "tiny.cpp").write_text('extern "C" int tiny() { return 2; }\n')
    _, err = outcome(tiny())
    assert "building" in err


def test_auto_on_a_cpu_never_builds_but_takes_what_is_there(tiny):
    out, err = outcome(tiny("auto"))
    assert out == [
        "kernel: torch (the CPU kernel is not built on this machine; --kernel cpu builds it once)", "not loaded"
    ]  # fmt: skip
    assert err == ""
    assert not tiny.extensions.exists()
    outcome(tiny())
    out, _ = outcome(tiny("auto"))
    assert out == ["kernel: cpu (built on this machine)", "loaded"]


def only_warning(err):
    lines = [line for line in err.splitlines() if line.startswith("warning:")]
    assert len(lines) == 1, err
    return lines[0]


def test_a_broken_compiler_is_one_warning_with_the_reason(tiny):
    out, err = outcome(tiny(CXX="/bin/false"))
    assert out == ["kernel: torch (the CPU kernel cannot be used)", "not loaded"]
    assert "the CPU kernel cannot be used, plain PyTorch goes on:" in only_warning(err)


def test_a_source_that_does_not_compile_shows_the_compilers_first_complaint(tiny):
    (tiny.folder / "tiny.cpp").write_text("int tiny( { return 1; }\n")
    _, err = outcome(tiny())
    assert "tiny.cpp:1" in only_warning(err)


@pytest.mark.parametrize("obstacle", ["a file in the way", "no permission"])
def test_a_cache_that_cannot_be_written_is_a_warning(tiny, tmp_path, obstacle):
    if obstacle == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tiny.extensions.mkdir(mode=0o500)
    else:
        tiny.extensions.write_text("")
    out, err = outcome(tiny())
    assert out[1] == "not loaded"
    assert str(tiny.extensions) in only_warning(err)


def test_a_built_kernel_loads_from_a_read_only_cache(tiny):
    outcome(tiny())
    for path in [tiny.extensions, *tiny.extensions.rglob("*")]:
        path.chmod(0o555)
    try:
        out, err = outcome(tiny("auto"))
    finally:
        for path in [tiny.extensions, *tiny.extensions.rglob("*")]:
            path.chmod(0o755)
    assert (out[1], err) == ("loaded", "")


def test_two_processes_at_once_build_once(tiny):
    both = [outcome(process) for process in [tiny(), tiny()]]
    assert [out[1] for out, _ in both] == ["loaded", "loaded"]
    assert sum("built the CPU kernel" in err for _, err in both) == 1


def test_a_killed_build_is_no_obstacle(tiny):
    slow = tiny.folder / "compiler"
    slow.write_text("#!/bin/sh\nsleep 600\n")
    slow.chmod(0o755)
    # killed while torch's builder holds its lock file and the compiler runs
    hanging = tiny(CXX=str(slow))
    deadline = time.monotonic() + 60
    while not list(tiny.extensions.rglob("build")) and time.monotonic() < deadline:
        time.sleep(0.1)
    work = next(tiny.extensions.rglob("build"))
    hanging.kill()
    hanging.communicate()
    (work / "lock").touch()
    (work / f"{work.parent.name}.so").write_text("half a library")
    out, _ = outcome(tiny())
    assert out[1] == "loaded"


def test_without_nvcc_a_gpu_runs_on_plain_pytorch(tmp_path):
    script = "from lowrank_cli.ops import fused_step as f; print(f.choose('auto', 'cuda')); f.choose('cuda', 'cuda:0')"
    env = {**os.environ, "CUDA_HOME": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
           "TORCH_CUDA_ARCH_LIST": "9.0"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kernel: torch (the CUDA kernel cannot be used)\n"
    assert done.stderr.count("warning: the CUDA kernel cannot be used, plain PyTorch goes on:") == 2


def test_a_kernel_for_another_device_is_the_users_mistake():
    from lowrank_cli.errors import UsageError
    from lowrank_cli.ops import fused_step

    for kernel, device in (("cuda", "cpu"), ("cpu", "cuda"), ("cpu", "mps")):
        with pytest.raises(UsageError, match="--kernel auto"):
            raise_with_hint(fused_step.choose, kernel, device)
    assert fused_step.choose("torch", "mps").name == "torch"
    assert fused_step.choose("auto", "mps").name == "torch"


def raise_with_hint(call, *args):
    from lowrank_cli.errors import UsageError

    try:
        call(*args)
    except UsageError as error:
        raise UsageError(f"{error.message}: {error.hint}") from None


def test_the_name_follows_what_the_code_depends_on(monkeypatch):
    before = build.library("cpu")
    monkeypatch.setattr(build, "_instructions", lambda: "another processor")
    assert build.library("cpu") != before
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    at_80 = build.library("cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert build.library("cuda") != at_80
