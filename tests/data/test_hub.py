"""The hub source against a stand-in for the Hugging Face hub on this machine."""

import gzip
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from lowrank_cli.data.documents import open_source
from lowrank_cli.errors import MissingError
from lowrank_cli.settings.training import DataConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def log_message(self, *args):
        pass

    def _answer(self, body: bytes = b""):
        path = unquote(urlsplit(self.path).path)
        name = next((name for name in self.server.repositories if f"/{name}" in path), None)
        if name is None:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        files = self.server.repositories[name]
        rest = path.split(f"/{name}", 1)[1].strip("/").split("/")
        if not path.startswith("/api/"):
            self._file(files, "/".join(rest[2:]))
        elif rest[0] == "tree":
            self._json([_entry(p, content) for p, content in files.items()])
        elif rest[0] == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            self._json([_entry(p, content) for p, content in files.items() if p in wanted])
        else:
            siblings = [{"rfilename": p} for p in files]
            self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def _file(self, files: dict[str, bytes], path: str):
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content, headers = files[path], {"X-Repo-Commit": COMMIT, "ETag": f'"{len(files[path])}"'}
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self._send(206, content[start : end + 1], headers)
        else:
            self._send(200, content, headers)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": COMMIT}


def serve(repositories: dict[str, dict[str, bytes]]) -> ThreadingHTTPServer:
    """A running hub with these repositories: id to path to content."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repositories, server.daemon_threads = repositories, True
    Thread(target=server.serve_forever, daemon=True).start()
    return server


def shard(start: int, end: int) -> bytes:
    lines = [json.dumps({"text": f"document {i} of the hub " * (i % 9 + 1)}) + "\n" for i in range(start, end)]
    return gzip.compress("".join(lines).encode())


CHECK = """
import json, torch
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.data.documents import open_source
from lowrank_cli.data.tokens import build
from lowrank_cli.errors import LowrankError

config = DataConfig(dataset="me/small", vocab_size=300, max_length=16)
everything = list(open_source(config))
assert len(everything) == 100 and everything[0].startswith("document 0 ")
source, other = open_source(config), open_source(config)
for count in (0, 1, 49, 50, 51, 99, 100):
    source.load_state_dict({})
    reading = iter(source)
    for _ in range(count):
        next(reading)
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert list(other) == everything[count:] and list(other) == everything
assert len(list(open_source(config, "validation"))) == 10

whole = DataConfig(dataset="me/whole", text_field="text")
assert len(list(open_source(whole))) == 57 and len(list(open_source(whole, "validation"))) == 3

for packing in ("packed", "padded"):
    settings = dict(batch_size=2, total_batch_size=6, eval_tokens=200, seed=0)
    form = DataConfig(dataset="me/small", vocab_size=300, max_length=16, packing=packing)
    first, second = build(form, **settings), build(form, **settings)
    for _ in range(5):
        first.train.next_update()
    second.train.load_state_dict(json.loads(json.dumps(first.train.state_dict())))
    for _ in range(40):
        a, b = first.train.next_update(), second.train.next_update()
        assert all(torch.equal(x["labels"], y["labels"]) for x, y in zip(a, b, strict=True))
    assert first.train.updates_per_epoch is None and list(first.validation())

state = first.train.state_dict()
other = build(DataConfig(dataset="me/whole", vocab_size=300, max_length=16, packing="padded"), **settings)
try:
    other.train.load_state_dict(state)
except LowrankError as error:
    assert "other data: dataset me/whole instead of me/small, held-out part train instead of None" in error.message, (
        error.message
    )
else:
    raise AssertionError("not refused")

errors = []
for config in (DataConfig(dataset="me/none"), DataConfig(dataset="me/small", text_field="body"),
               DataConfig(dataset="me/small", dataset_config="xx"), DataConfig(dataset="me/broken")):
    try:
        list(open_source(config))
    except LowrankError as error:
        errors.append([error.exit_code, error.message, error.hint])
try:
    open_source(DataConfig(dataset="me/small"), offline=True)
except LowrankError as error:
    errors.append([error.exit_code, error.message, error.hint])
print(json.dumps(errors))
"""


def run(code: str, endpoint: str, home: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_hub_data_set_streams_resumes_and_fails_with_one_line(tmp_path):
    server = serve(
        {
            "me/small": {
                "train-00000.json.gz": shard(0, 50),
                "train-00001.json.gz": shard(50, 100),
                "validation.json.gz": shard(100, 110),
            },
            "me/whole": {"data.json.gz": shard(0, 60)},
            "me/broken": {"train.json": b'{"text": "a"}\n{"text": \n'},
        }
    )
    done = run(CHECK, f"http://127.0.0.1:{server.server_port}", tmp_path)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    none, no_field, no_config, broken, offline = json.loads(done.stdout.splitlines()[-1])
    assert none[0] == 4
    assert "the hub has no data set 'me/none'" in none[1]
    assert no_field[0] == 2
    assert "document 1: no 'text'".replace("text", "body") in no_field[1]
    assert "keys: text" in no_field[1]
    assert no_config[0] == 2
    assert "unknown configuration 'xx'" in no_config[1]
    assert broken[0] in (1, 2)
    assert offline[0] == 4
    assert "run is offline" in offline[1]
    assert all("\n" not in message + hint for _, message, hint in (none, no_field, no_config, broken, offline))


def test_no_network_is_one_line(tmp_path):
    code = """
import time
# huggingface_hub waits 23 seconds between its tries
time.sleep = lambda _: None
from lowrank_cli.settings.training import DataConfig
from lowrank_cli.data.documents import open_source
from lowrank_cli.errors import MissingError
try:
    open_source(DataConfig(dataset="me/small"))
except MissingError as error:
    print(error.message, "|", error.hint)
"""
    done = run(code, "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "me/small cannot be reached" in done.stdout
    assert done.stdout.count("\n") == 1


def test_offline_without_a_cached_copy_names_both_ways_out():
    with pytest.raises(MissingError, match="not in the cache and the run is offline") as caught:
        open_source(DataConfig(dataset="allenai/c4"), offline=True)
    assert "--offline" in caught.value.hint
    assert "--dataset" in caught.value.hint
