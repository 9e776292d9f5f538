"""A stand-in for the Hugging Face hub on this machine: the few requests that streaming a data set makes."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

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
        self.server.requests.append(f"{self.command} {path}")
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
    """A running hub with these repositories: id to path to content; its ``requests`` are kept."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repositories, server.requests, server.daemon_threads = repositories, [], True
    Thread(target=server.serve_forever, daemon=True).start()
    return server
