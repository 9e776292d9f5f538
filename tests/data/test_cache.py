import os
import socket
import subprocess
import sys

import pytest

from lowrank_cli.data.cache import cached_folder
from lowrank_cli.data.corpus import tokenized
from lowrank_cli.data.documents import open_source
from lowrank_cli.data.rows import Encoder
from lowrank_cli.data.tokenizer import named_tokenizer
from lowrank_cli.errors import LowrankError
from lowrank_cli.settings.training import DataConfig


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "zeroed": bytes(len(content)), "other": b"{"}[how])


@pytest.mark.parametrize("how", ["missing", "cut", "zeroed", "other"])
@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "about.json", "manifest.json"])
def test_a_damaged_corpus_is_made_again_with_one_line(name, how, folder, write, documents, test_data, capsys):
    config = DataConfig(dataset=str(write("a.jsonl", [{"text": text} for text in documents])))
    encoder = Encoder(named_tokenizer(str(test_data / "tokenizers" / "gpt2")), "packed", 16)
    rows = [row.tolist() for row in tokenized(open_source(config), encoder).rows()]
    (entry,) = (folder / "tokens").iterdir()
    damage(entry / name, how)
    assert [row.tolist() for row in tokenized(open_source(config), encoder).rows()] == rows
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("an entry of the cache is damaged and is made again: ")
    assert str(entry / name) in line
    assert [row.tolist() for row in tokenized(open_source(config), encoder).rows()] == rows
    assert capsys.readouterr().err == ""
    assert list((folder / "tokens").iterdir()) == [entry]


@pytest.mark.parametrize("place", [0, 5_000_000, 9_999_999])
def test_of_a_large_file_blocks_are_compared(place):
    made = []

    def make(path):
        made.append(path)
        (path / "large").write_bytes(b"x" * 10_000_000)

    file = cached_folder("kind", "key", make) / "large"
    assert cached_folder("kind", "key", make) == file.parent
    assert len(made) == 1
    with file.open("r+b") as opened:
        opened.seek(max(0, place - 200_000))
        opened.write(bytes(200_000))
    cached_folder("kind", "key", make)
    assert len(made) == 2
    assert set(file.read_bytes()) == set(b"x")


def test_leftovers_of_processes_that_are_gone_are_removed(folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    names = [f".abc-{host}-{gone.pid}-x1", f".abc-{host}-{os.getpid()}-x2", f".abc-other-{host}-{gone.pid}-x3", ".abc"]
    for name in names:
        (folder / "kind" / name / "whole").mkdir(parents=True)
    cached_folder("kind", "key", lambda path: (path / "file").write_text("x"))
    assert {path.name for path in (folder / "kind").iterdir()} == {"key", *names[1:]}


def test_scratch_folders_name_their_process_and_are_on_the_disk_before_they_have_their_name(folder, monkeypatch):
    seen, fsync, replace = [], os.fsync, os.replace

    def make(path):
        (path / "deep").mkdir()
        (path / "deep" / "file").write_text("x")
        seen.append(path.parent.name)

    monkeypatch.setattr(os, "fsync", lambda d: (seen.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("renamed"), replace(a, b)))
    cached_folder("kind", "0123456789", make)
    assert seen[0].startswith(f".01234567-{socket.gethostname()}-{os.getpid()}-")
    whole = folder / "kind" / seen[0] / "whole"
    flushed = {str(path) for path in (whole, whole / "deep", whole / "deep" / "file", whole / "manifest.json")}
    assert set(seen[1 : seen.index("renamed")]) == flushed
    assert seen[seen.index("renamed") + 1 :] == [str(folder / "kind")]


def test_an_entry_that_was_made_meanwhile_is_used_unless_it_is_damaged(folder):
    def late(path):
        (path / "by").write_text("late")
        cached_folder("kind", "key", lambda other: (other / "by").write_text("early"))

    assert (cached_folder("kind", "key", late) / "by").read_text() == "early"
    (folder / "kind" / "key" / "by").write_text("broken")
    assert (cached_folder("kind", "key", late) / "by").read_text() == "early"


def test_a_cache_that_cannot_be_written_is_said(folder):
    folder.write_text("a file")
    with pytest.raises(LowrankError, match="cache folder .* cannot be written") as caught:
        cached_folder("kind", "key", lambda path: None)
    assert "LOWRANK_CACHE" in caught.value.hint


def test_without_a_home_there_is_a_sentence(lowrank, news, tiny_config, monkeypatch):
    import pwd

    def nobody(uid):
        raise KeyError(uid)

    for name in ("LOWRANK_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    code, _, err = lowrank("pretrain --max-steps 1 --no-plots --dataset", news, "--model-config", tiny_config)
    assert code == 1
    assert "LOWRANK_CACHE" in err
    assert "bug" not in err
