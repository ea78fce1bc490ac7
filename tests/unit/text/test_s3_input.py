"""Input from s3://, through s3fs and real HTTP requests."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text.corpus import Document, SkippedRecord, plan_units
from retro_ray.text.readers import read_unit
from tests.unit.text.object_store import object_store


def parquet_bytes(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=5, compression="none")
    return sink.getvalue()


ROWS = [f"row {number} " * 20 for number in range(20)]
OBJECTS = {
    "corpus/docs/a.md": b"# Title\n\nfianc\xc3\xa9\n",
    "corpus/docs/sub/b.jsonl.gz": gzip.compress(b'{"text": "one"}\nbroken\n{"text": "two"}\n'),
    "corpus/docs/rows.parquet": parquet_bytes(ROWS),
    "corpus/docs/torn.parquet": b"not parquet",
    "corpus/other/image.png": b"x",
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with object_store(OBJECTS) as endpoint:
        settings = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()


def read(given: str, unit_bytes: int = 10_000_000) -> list[Document | SkippedRecord]:
    corpus = CorpusConfig(input=(given,))
    return [record for unit in plan_units(corpus, unit_bytes) for record in read_unit(unit, corpus)]


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("given", ["s3://corpus/docs", "s3://corpus/docs/", "s3://corpus/docs/**"])
def test_folder_and_glob_on_s3(given: str) -> None:
    records = read(given, unit_bytes=2000)
    root = "s3://corpus/docs"
    assert records == [
        Document("docs/sub/b.jsonl.gz#1", "docs/sub/b.jsonl.gz#1", f"{root}/sub/b.jsonl.gz", "one"),
        *[record for record in records[1:2] if isinstance(record, SkippedRecord)],
        Document("docs/sub/b.jsonl.gz#3", "docs/sub/b.jsonl.gz#3", f"{root}/sub/b.jsonl.gz", "two"),
        *[
            Document(f"docs/rows.parquet#{row}", f"docs/rows.parquet#{row}", f"{root}/rows.parquet", text)
            for row, text in enumerate(ROWS, start=1)
        ],
        *[record for record in records[-2:-1] if isinstance(record, SkippedRecord)],
        Document("docs/a.md", "Title", f"{root}/a.md", "# Title\n\nfianc\u00e9\n"),
    ]
    broken, torn = (record for record in records if isinstance(record, SkippedRecord))
    assert (broken.source, broken.line, broken.category) == (f"{root}/sub/b.jsonl.gz", 2, "malformed line")
    assert (torn.source, torn.line, torn.category) == (f"{root}/torn.parquet", None, "not a Parquet file")


@pytest.mark.usefixtures("bucket")
def test_one_object_on_s3() -> None:
    (document,) = read("s3://corpus/docs/a.md")
    assert isinstance(document, Document)
    assert (document.id, document.source) == ("a.md", "s3://corpus/docs/a.md")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3://corpus/docs/missing.txt", "--input s3://corpus/docs/missing.txt does not exist"),
        ("s3://corpus/nothing/*.txt", r"--input s3://corpus/nothing/\*.txt matches nothing"),
        ("s3://corpus/other", "--input s3://corpus/other holds no file that can be read"),
        ("s3://no-such-bucket/docs", "--input s3://no-such-bucket/docs"),
    ],
)
def test_input_on_s3_that_cannot_be_read_is_one_line(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(given)
    assert "\n" not in str(caught.value)


def test_s3_without_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"cannot list --input s3://corpus/docs \(.*check the address and the cred"):
        read("s3://corpus/docs")
    s3fs.S3FileSystem.clear_instance_cache()
