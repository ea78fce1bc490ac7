"""A corpus of some 60 small documents in three formats, with records that cannot be read, and its database."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retro_ray.config import CorpusConfig, DatabaseConfig
from retro_ray.database.format import Manifest
from retro_ray.database.store import Database
from retro_ray.text.corpus import Document

M = 32
CONFIG = DatabaseConfig(tokenizer="train:400", chunk_length=M, num_shards=3, num_neighbours=6, validation_share=0.15)
FLAGS = (
    *("--tokenizer", "train:400", "--chunk-length", str(M), "--num-shards", "3"),
    *("--num-neighbours", "6", "--validation-share", "0.15"),
)
"""The same for jobs/index.py."""
WORDS = [
    "river",
    "mountain",
    "harbour",
    "bridge",
    "engine",
    "valve",
    "piston",
    "copper",
    "silver",
    "granite",
    "meadow",
    "forest",
    "orchard",
    "lantern",
    "window",
    "kettle",
    "violin",
    "trumpet",
    "sonata",
    "chapter",
    "sentence",
    "grammar",
    "theorem",
    "lemma",
    "proof",
    "vector",
    "matrix",
    "planet",
    "comet",
    "orbit",
]

BAD_RECORDS = [
    ("b.jsonl.gz", 3, "malformed line"),
    ("b.jsonl.gz", 7, "empty document"),
    ("b.jsonl.gz", 12, "missing column"),
    ("c-broken.txt", 2, "invalid UTF-8"),
]


@dataclass
class Built:
    """A database, and what it was made from."""

    home: Path
    corpus: CorpusConfig
    documents: list[Document]
    manifest: Manifest

    @property
    def database(self) -> Database:
        return Database.open(self.home)

    def copy(self, home: Path) -> Path:
        """The same database in another home; times of change stay."""
        return shutil.copytree(self.home, home)


def write_corpus(folder: Path) -> list[Document]:
    """Files of the corpus; returns its readable documents in reading order (JSON lines, Parquet, text)."""
    folder.mkdir()
    rng = np.random.default_rng(5)

    def text(low: int, high: int) -> str:
        own = rng.choice(WORDS, 8)
        return " ".join(rng.choice(own, int(rng.integers(low, high))))

    # The same text in several documents, and one document of one letter: exact ties, and the shortest there is.
    shared = text(100, 101)
    lines, from_json = [], []
    for number in range(25):
        document = {"id": f"json-{number}", "title": f"Line {number}", "text": text(5, 260)}
        document["text"] = {3: shared, 4: "x", 9: shared}.get(number, document["text"])
        from_json.append((document["id"], document["title"], document["text"]))
        lines.append(json.dumps(document))
    for place, bad in ((2, '{"id": "cut off'), (6, '{"id": "e", "text": "  "}'), (11, '{"id": "m", "body": "b"}')):
        lines.insert(place, bad)
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    rows = [{"id": f"row-{n}", "title": f"Row {n}", "text": shared if n == 2 else text(5, 260)} for n in range(25)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    texts = {f"c-{number:02d}.txt": text(5, 260) for number in range(10)}
    for name, content in texts.items():
        (folder / name).write_text(content)
    (folder / "c-broken.txt").write_bytes(b"fine\nnot \xff\xfe fine\n")
    source = {"json": str(folder / "b.jsonl.gz"), "row": str(folder / "a.parquet")}
    return [
        *(Document(name, title, source["json"], content) for name, title, content in from_json),
        *(Document(row["id"], row["title"], source["row"], row["text"]) for row in rows),
        *(Document(f"{folder.name}/{name}", name, str(folder / name), texts[name]) for name in sorted(texts)),
    ]
