from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from pydoc_data import topics

import pytest

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text import python_docs
from retro_ray.text.corpus import Document, SkippedRecord, plan_units
from retro_ray.text.readers import read_unit


def test_plan_covers_topics_standard_library_and_transformers_once() -> None:
    groups = list(python_docs.plan_groups())
    entries = [entry for group, _ in groups for entry in group]
    assert len(entries) == len(set(entries))
    assert len(entries) > 2500
    assert len(groups) > 8
    for expected in ("topics:assert", "stdlib:json/decoder.py", "transformers:models/bert/modeling_bert.py"):
        assert expected in entries
    assert not [entry for entry in entries if "/test/" in entry or "/tests/" in entry or "site-packages" in entry]
    assert all(size <= python_docs.GROUP_BYTES for group, size in groups if len(group) > 1)
    assert list(python_docs.plan_groups()) == groups


def test_documents_are_modules_with_the_docstrings_of_their_parts() -> None:
    loaded_before = set(sys.modules)
    docs = python_docs.read_docs("stdlib:json/decoder.py")
    assert docs is not None
    assert docs.name == "json.decoder"
    assert docs.text.startswith("json.decoder\n\nImplementation of JSONDecoder\n\njson.decoder.JSONDecodeError\n\n")
    assert "json.decoder.JSONDecoder.raw_decode\n\nDecode a JSON document" in docs.text
    package = python_docs.read_docs("stdlib:turtledemo/__init__.py")
    assert package is not None
    assert package.name == "turtledemo"
    assert "turtledemo" not in set(sys.modules) - loaded_before


def test_topics_are_documents() -> None:
    docs = python_docs.read_docs("topics:assert")
    assert docs == python_docs.ModuleDocs("topics.assert", topics.topics["assert"])


def test_module_without_docstrings_is_no_document() -> None:
    assert python_docs.read_docs("stdlib:pydoc_data/__init__.py") is None


def test_a_sample_of_units_is_read_whole_and_in_order() -> None:
    corpus = CorpusConfig()
    units = plan_units(corpus)
    sample = [units[0], units[len(units) // 2]]
    records = [record for unit in sample for record in read_unit(unit, corpus)]
    documents = [record for record in records if isinstance(record, Document)]
    assert documents == records
    assert len({document.id for document in documents}) == len(documents) > 50
    assert all(document.id == f"python-docs/{document.title}" for document in documents)
    assert {document.source for document in documents} == {"python-docs"}
    assert list(islice(read_unit(sample[0], corpus), 5)) == documents[:5]


def test_source_that_cannot_be_parsed_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text('"""Good."""\nif True:\n    def f():\n        r"""In a branch \\d."""\n')
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "nul.py").write_bytes(b"x = '\0'\n")
    monkeypatch.setattr(python_docs, "_root_folder", lambda root: tmp_path)
    unit = plan_units(CorpusConfig())[0]
    unit = type(unit)(0, ("stdlib:bad.py", "stdlib:good.py", "stdlib:nul.py", "stdlib:gone.py"), unit.format, None, 1)
    bad, good, nul, gone = read_unit(unit, CorpusConfig())
    assert isinstance(good, Document)
    assert good.text == "good\n\nGood.\n\ngood.f\n\nIn a branch \\d."
    for record, name in ((bad, "bad"), (nul, "nul"), (gone, "gone")):
        assert isinstance(record, SkippedRecord)
        assert (record.source, record.category) == (f"stdlib:{name}.py", "unparsable source")
        assert record.detail
    with pytest.raises(InputError, match=r"stdlib:bad.py: unparsable source: .*--on-error skip"):
        list(read_unit(unit, CorpusConfig(on_error="fail")))


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="python-docs needs the package transformers"):
        plan_units(CorpusConfig())
