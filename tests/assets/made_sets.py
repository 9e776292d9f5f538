"""A folder of made data in the layout of the published sets, so that one code path reads both."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import made_downstream
import made_glue
import made_mmlu
import made_records
import made_text
import made_tokenizers


def write(folder: Path) -> None:
    """Write every set; a few seconds."""
    write_corpora(folder)
    made_records.write(folder / "instruct")
    made_glue.write(folder / "glue")
    made_mmlu.write(folder / "mmlu")
    made_downstream.write(folder / "downstream")
    made_tokenizers.write(folder / "tokenizers")


def write_corpora(folder: Path) -> None:
    """Write articles as gzipped JSON lines, WikiText's two forms, and a play."""
    for name, counts in {"wikinews_en": {"train": 600, "validation": 150}, "c4": {"c4_en_1500": 150}}.items():
        (folder / name).mkdir(parents=True)
        for part, count in counts.items():
            lines = "".join(json.dumps(a) + "\n" for a in made_text.articles(count, f"{name} {part}"))
            with gzip.open(folder / name / f"{part}.json.gz", "wt", encoding="utf-8") as file:
                file.write(lines)
    (folder / "wikitext-2").mkdir()
    for part, count in {"train": 80, "valid": 20, "test": 20}.items():
        pages = made_text.encyclopaedia(count, part)
        raw = "".join(f" \n = {title} = \n \n{body}\n" for title, body in pages)
        (folder / "wikitext-2" / f"wiki.{part}.raw").write_text(raw, encoding="utf-8")
        (folder / "wikitext-2" / f"wiki.{part}.tokens").write_text(raw.lower(), encoding="utf-8")
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text(made_text.play(3000, 0), encoding="utf-8")
