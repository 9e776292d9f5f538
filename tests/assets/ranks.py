"""Runs on several processes: real ones, over gloo, kept alive from test to test."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Result:
    """What one rank's run came to."""

    code: int
    out: str
    err: str
    sent: list[tuple[str, int, bool]]


class Ranks:
    """A pool of workers; `run` starts as many runs as there are command lines."""

    def __init__(self):
        self.workers: list[subprocess.Popen] = []

    def run(self, *lines: list, folder: Path, before: str = "", env: dict[str, str] | None = None) -> list[Result]:
        """Run one command line on each rank of a new process group; returns when all have ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        while len(self.workers) < len(lines):
            self.workers.append(
                subprocess.Popen([sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        used = self.workers[: len(lines)]
        for rank, (worker, argv) in enumerate(zip(used, lines, strict=True)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(lines), "MASTER_PORT": port}
            place = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} | (env or {})
            request = {"argv": [str(a) for a in argv], "env": place, "folder": str(folder), "before": before}
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
        return [Result(**json.loads(worker.stdout.readline())) for worker in used]

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
