"""Compiled kernels for the tests: built once for a checkout, shared by sessions and workers."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernel_folder(request, shared_folder) -> Path:
    """Return a folder for built kernels that outlives the session: their names change with the sources."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("kernels") if cache else shared_folder / "kernels"


@pytest.fixture(scope="session")
def kernel_device(kernel_folder):
    """Return the device on which `torch.ops.lowrank` runs compiled: the CPU extension's, built here unless it was.

    LOWRANK_TEST_KERNEL, for runs of the same tests in another process: `cuda`, or a library to load instead.
    """
    import torch

    from lowrank_cli.ops import build, fused_step  # noqa: F401

    given = os.environ.get("LOWRANK_TEST_KERNEL", "cpu")
    if given not in build.SOURCES:
        torch.ops.load_library(given)
        return torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        if given == "cpu":
            patch.setenv("TORCH_EXTENSIONS_DIR", str(kernel_folder))
        try:
            build.load(given)
        except build.BuildError as error:
            if given == "cpu" and shutil.which(os.environ.get("CXX", "c++")) and "inja" not in str(error):
                raise
            pytest.skip(f"the {given} kernel does not build here: {error}")
    return torch.device(given)
