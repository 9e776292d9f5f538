import gzip
import json

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
            content = content.encode()
            content = gzip.compress(content) if name.endswith(".gz") else content
        path.write_bytes(content)
        return path

    return write_file


@pytest.fixture
def documents():
    """60 texts of very different lengths."""
    return [" ".join(f"word{(i * 7 + j * j) % 50}" for j in range(1 + (i * 13) % 90)) for i in range(60)]
