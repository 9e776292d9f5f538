"""What is printed, and where it cannot be: text is text, and work does not depend on who looks at it."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lowrank_cli import console
from lowrank_cli.strict_json import dumps

STEERING = "\x1b[31mred\x07 \x9b1A \x7f\u202eright\u2066"
WRITTEN_OUT = r"\x1b[31mred\x07 \x9b1A \x7f\u202eright\u2066"


@pytest.mark.parametrize("text", ["exp [lora]", "run [/b]", "[red]x[/red]", "a:smile:b", "[link=x]", r"\[bold]"])
def test_text_is_no_markup(text, capsys):
    console.note(f"note {text}")
    console.error(f"message {text}", f"hint {text}")
    console.table(f"title {text}", [f"column {text}"], [[f"cell {text}"]])
    err = capsys.readouterr().err
    for part in ("note", "message", "hint", "title", "column", "cell"):
        assert f"{part} {text}" in err


def test_bars_take_text_as_it_is(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=True, force_interactive=True))
    monkeypatch.setenv("TERM", "xterm")
    with console.bar() as bar:
        bar.add_task("task [/b] :smile:", total=2)
        bar.refresh()
    assert "task [/b] :smile:" in screen.getvalue()


def test_control_characters_are_written_out(capsys, tmp_path):
    console.log_to(tmp_path / "log.txt")
    console.note(STEERING)
    console.table(STEERING, [STEERING], [[STEERING]])
    console.log_only(STEERING)
    console.output(f"{STEERING}\tand\nso on")
    console.log_to(None)
    out, err = capsys.readouterr()
    assert err.count(WRITTEN_OUT) == 4
    assert out == f"{WRITTEN_OUT}\tand\nso on\n"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log.count(WRITTEN_OUT) == 4
    assert not set(err + out + log) & set(STEERING) - set(WRITTEN_OUT)


def test_control_characters_in_json_stay_what_they_are(capsys):
    console.output(dumps({"text": STEERING}))
    assert json.loads(capsys.readouterr().out) == {"text": STEERING}


def test_json_has_no_numbers_that_are_none():
    content = {"a": float("nan"), "b": [1.5, float("-inf"), ("x", float("inf"))], "c": {"d": 2, "e": True}}
    assert json.loads(dumps(content)) == {"a": None, "b": [1.5, None, ["x", None]], "c": {"d": 2, "e": True}}
    assert "NaN" not in dumps(content)


TRAIN = "pretrain --max-steps 3 --out run"


def start(line: str, *more, **streams) -> subprocess.Popen:
    """The command with streams of its own."""
    return subprocess.Popen([sys.executable, "-m", "lowrank_cli", *line.split(), *map(str, more)], **streams)


def assert_trained() -> None:
    assert Path("run/model/model.safetensors").is_file()
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    assert "step 3/3" in Path("run/log.txt").read_text()


@pytest.mark.parametrize(
    "screen", ["terminal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pipe", "full", "closed"))]
)
def test_training_goes_on_without_its_screen(screen, tmp_path, monkeypatch, tiny_flags):
    monkeypatch.chdir(tmp_path)
    if screen == "pipe":
        # its reader is gone before the first line
        reader, writer = os.pipe()
        os.close(reader)
    elif screen == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    elif screen == "terminal":
        reader, writer = pty.openpty()
    if screen == "closed":
        child = subprocess.Popen(
            ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-m", "lowrank_cli", *TRAIN.split(), *tiny_flags],
            stdout=subprocess.PIPE,
        )
    else:
        child = start(TRAIN, *tiny_flags, stdout=subprocess.PIPE, stderr=writer)
        os.close(writer)
    if screen == "terminal":
        # reads fail with EIO, writes too, as where a terminal was closed
        os.read(reader, 1)
        os.close(reader)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert out.startswith(b"validation perplexity")
    assert_trained()


@pytest.mark.parametrize(("sink", "line"), [
    ("pipe", "--version"), ("full", "--help"),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in [("full", TRAIN), ("pipe", TRAIN), ("full", "--version"), ("pipe", "--help")]),
])  # fmt: skip
def test_stdout_that_takes_nothing_costs_the_result_line_only(line, sink, tmp_path, monkeypatch, tiny_flags):
    monkeypatch.chdir(tmp_path)
    if sink == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    child = start(line, *(tiny_flags if line == TRAIN else []), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    err = child.communicate(timeout=120)[1].decode()
    assert child.returncode == 1, err
    for unwanted in ("Traceback", "Exception ignored", "this is a bug"):
        assert unwanted not in err
    if line == "--help":
        assert err == ""
    else:
        why = "no space left on device" if sink == "full" else "broken pipe"
        assert f"error: the result could not be printed: {why}" in err
    if line == TRAIN:
        assert_trained()


@pytest.mark.parametrize(("line", "how"), [
    pytest.param("svd-dump --model caf\u00e9-\u202e", {"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
    ("--help", {"LC_ALL": "C", "PYTHONUTF8": "0"}),
])  # fmt: skip
def test_ascii_streams_get_escapes(line, how, process):
    child = process(line, PYTHONCOERCECLOCALE="0", **how)
    out, err = child.communicate(timeout=60)
    assert child.returncode == (0 if line == "--help" else 4), err
    assert (out + err).isascii()
    assert "Traceback" not in err
    if line != "--help":
        assert "no folder caf\\" in err
