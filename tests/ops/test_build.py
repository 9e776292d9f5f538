"""The loader of compiled kernels, in processes of its own: what a user without a compiler meets."""

import multiprocessing
import time

import pytest

from lowrank_cli.ops import build

# a source that compiles in a second stands for the real ones: what is tested is the loader
TINY = """
build.SOURCES, build.HEADERS, build.sources = {"cpu": ("tiny.cpp",)}, (), lambda: sources
print(fused_step.choose(kernel, "cpu"))
print("loaded" if build.is_loaded("cpu") else "not loaded")
"""
# what a process does before: its output goes to files
BEGIN = """
import os
os.environ.update(env)
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
from lowrank_cli.ops import build, fused_step
"""


class Process:
    """A process that runs a script, forked from one that has imported torch; a new one would take seconds."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowrank_cli.ops.fused_step"])

    def __init__(self, folder, script, env, **names):
        self.folder = folder
        self.process = self.context.Process(
            target=exec, args=(BEGIN + script, {"folder": folder, "env": env, **names}), daemon=True
        )
        self.process.start()

    def kill(self):
        self.process.kill()
        self.process.join()

    def outcome(self):
        """Return the lines of stdout, and stderr, when the process has ended."""
        self.process.join(300)
        out, err = (path.read_text() if (path := self.folder / name).exists() else "" for name in ("out", "err"))
        assert self.process.exitcode == 0, err
        return out.splitlines(), err


@pytest.fixture
def process(tmp_path):
    """Start a process that runs a script."""
    started = []

    def start(script, *, env, **names):
        folder = tmp_path / f"process{len(started)}"
        folder.mkdir()
        started.append(Process(folder, script, env, **names))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def tiny(process, tmp_path):
    """Start a process that chooses a kernel whose source is one line; returns it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.cpp").write_text('extern "C" int tiny() { return 1; }\n')

    def start(kernel="cpu", **env):
        env = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), **env}
        return process(TINY, env=env, sources=folder, kernel=kernel)

    start.folder = folder
    start.extensions = tmp_path / "extensions"
    return start


def test_the_first_use_builds_and_the_second_only_loads(tiny):
    out, err = tiny().outcome()
    assert out == ["kernel: cpu (as asked)", "loaded"]
    assert "building the CPU kernel, once for this machine" in err
    out, err = tiny(CXX="/bin/false").outcome()
    assert (out[1], err) == ("loaded", "")


def test_a_changed_source_is_built_anew(tiny):
    tiny().outcome()
    (tiny.folder / "tiny.cpp").write_text('extern "C" int tiny() { return 2; }\n')
    _, err = tiny().outcome()
    assert "building" in err


def test_auto_on_a_cpu_never_builds_but_takes_what_is_there(tiny):
    out, err = tiny("auto").outcome()
    assert out == [
        "kernel: torch (the CPU kernel is not built on this machine; --kernel cpu builds it once)", "not loaded"
    ]  # fmt: skip
    assert err == ""
    assert not tiny.extensions.exists()
    tiny().outcome()
    out, _ = tiny("auto").outcome()
    assert out == ["kernel: cpu (built on this machine)", "loaded"]


def only_warning(err):
    lines = [line for line in err.splitlines() if line.startswith("warning:")]
    assert len(lines) == 1, err
    return lines[0]


def test_a_broken_compiler_is_one_warning_with_the_reason(tiny):
    out, err = tiny(CXX="/bin/false").outcome()
    assert out == ["kernel: torch (the CPU kernel cannot be used)", "not loaded"]
    assert "the CPU kernel cannot be used, plain PyTorch goes on:" in only_warning(err)


def test_a_source_that_does_not_compile_shows_the_compilers_first_complaint(tiny):
    (tiny.folder / "tiny.cpp").write_text("int tiny( { return 1; }\n")
    _, err = tiny().outcome()
    assert "tiny.cpp:1" in only_warning(err)


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_cache_that_cannot_be_written_is_a_warning(tiny, below):
    # a regular file is in the way, of root too
    tiny.extensions.write_text("")
    out, err = tiny(TORCH_EXTENSIONS_DIR=str(tiny.extensions / below)).outcome()
    assert out[1] == "not loaded"
    assert str(tiny.extensions) in only_warning(err)


def test_a_built_kernel_loads_from_a_read_only_cache(tiny):
    tiny().outcome()
    for path in [tiny.extensions, *tiny.extensions.rglob("*")]:
        path.chmod(0o555)
    try:
        out, err = tiny("auto").outcome()
    finally:
        for path in [tiny.extensions, *tiny.extensions.rglob("*")]:
            path.chmod(0o755)
    assert (out[1], err) == ("loaded", "")


def test_two_processes_at_once_build_once(tiny):
    both = [process.outcome() for process in [tiny(), tiny()]]
    assert [out[1] for out, _ in both] == ["loaded", "loaded"]
    assert sum("built the CPU kernel" in err for _, err in both) == 1


def test_a_killed_build_is_no_obstacle(tiny):
    slow = tiny.folder / "compiler"
    slow.write_text("#!/bin/sh\nwhile [ -e $0 ]; do sleep 0.1; done\n")
    slow.chmod(0o755)
    # killed while torch's builder holds its lock file and the compiler runs
    hanging = tiny(CXX=str(slow))
    deadline = time.monotonic() + 60
    while not list(tiny.extensions.rglob("build")) and time.monotonic() < deadline:
        time.sleep(0.1)
    work = next(tiny.extensions.rglob("build"))
    hanging.kill()
    slow.unlink()
    (work / "lock").touch()
    (work / f"{work.parent.name}.so").write_text("half a library")
    out, _ = tiny().outcome()
    assert out[1] == "loaded"


def test_without_nvcc_a_gpu_runs_on_plain_pytorch(process, tmp_path):
    env = {"CUDA_HOME": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
           "TORCH_CUDA_ARCH_LIST": "9.0"}  # fmt: skip
    script = "print(fused_step.choose('auto', 'cuda')); fused_step.choose('cuda', 'cuda:0')"
    out, err = process(script, env=env).outcome()
    assert out == ["kernel: torch (the CUDA kernel cannot be used)"]
    assert err.count("warning: the CUDA kernel cannot be used, plain PyTorch goes on:") == 2


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
