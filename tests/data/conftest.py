import bz2
import gzip
import json
import lzma

import pytest


@pytest.fixture
def write(tmp_path):
    """write(name, records or text or bytes) -> path, in a format that the ending says."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        if isinstance(content, str):
            compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
            content = compress(content.encode())
        path.write_bytes(content)
        return path

    return write_file


@pytest.fixture
def documents():
    """60 texts of very different lengths."""
    return [" ".join(f"word{(i * 7 + j * j) % 50}" for j in range(1 + (i * 13) % 90)) for i in range(60)]
