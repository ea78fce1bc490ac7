"""The end of the demo: what the model knows is changed without training it.

A few held-out documents are added to a copy of the database, and the same checkpoint is asked before and after.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from retro_ray.database.store import Database
    from retro_ray.text.corpus import Document

_NUM_DOCUMENTS = 5
_MIN_CHUNKS, _MAX_CHUNKS = 5, 40
_PROMPT_CHUNKS, _SHOWN_CHUNKS = 2, 1


@dataclass(frozen=True)
class Update:
    """One checkpoint before and after."""

    result: dict[str, Any]
    """Of `compare`."""
    prompt: str
    written: str
    """How the document goes on."""
    before: str
    """How the model goes on."""
    after: str


def update_database(home: Path) -> Update:
    """Add some held-out documents to a copy of a home's database, and compare."""
    from retro_ray.building.edit import DatabaseEditor
    from retro_ray.database.format import database_directory
    from retro_ray.database.store import Database
    from retro_ray.evaluation.own_text import document_tokens
    from retro_ray.evaluation.subject import open_subject
    from retro_ray.evaluation.update import compare

    before = Database.open(home)
    with open_subject(home) as subject, tempfile.TemporaryDirectory(dir=home / "cache", prefix="demo-") as folder:
        chosen = choose_documents(subject.store.document_num_chunks)
        # The files of a database never change, so that a copy can share them: an edit adds some, and replaces the
        # manifest.
        shutil.copytree(before.directory, database_directory(Path(folder)), copy_function=os.link)
        DatabaseEditor(Path(folder)).update(held_out_document(before, int(number)) for number in chosen)
        after = Database.open(folder)
        result = compare(dataclasses.replace(subject, documents=chosen), before, after)
        number, m = int(chosen[0]), before.chunk_length
        tokens = document_tokens(subject.store, number)[1:]
        cut, stop = _PROMPT_CHUNKS * m - 1, (_PROMPT_CHUNKS + _SHOWN_CHUNKS) * m - 1
        prompt, written = (before.tokenizer.decode(part) for part in (tokens[:cut], tokens[cut:stop]))
        texts = [_generate(home, database, prompt) for database in (before, after)]
    return Update(result, prompt, written, *texts)


def choose_documents(num_chunks: np.ndarray) -> np.ndarray:
    """A few documents that are neither too short to gain nor long to read, ascending; any where there are none."""
    import numpy as np

    fitting = np.flatnonzero((num_chunks >= _MIN_CHUNKS) & (num_chunks <= _MAX_CHUNKS))
    return (fitting if len(fitting) else np.arange(len(num_chunks)))[:_NUM_DOCUMENTS]


def held_out_document(database: Database, number: int) -> Document:
    """A document of the validation split as it was read."""
    from retro_ray.evaluation.own_text import document_tokens
    from retro_ray.text.corpus import Document

    store = database.validation
    if store is None:
        raise ValueError("a database that is evaluated has a validation split")
    ref = store.document_ref(number)
    text = database.tokenizer.decode(document_tokens(store, number)[1:])
    return Document(id=ref.id, title=ref.title, source=ref.source, text=text)


def _generate(home: Path, database: Database, prompt: str) -> str:
    """The model's continuation of a chunk, greedily; searched in this process."""
    from retro_ray.generation.engine import GenerationEngine
    from retro_ray.generation.fast_model import fast_model
    from retro_ray.generation.request import GenerationRequest
    from retro_ray.generation.sampling import SamplingConfig
    from retro_ray.retrieval.local import LocalRetriever
    from retro_ray.retrieval.retriever import ChunkRetriever
    from retro_ray.training.checkpoint import load_model
    from retro_ray.training.run_folder import run_directory

    model, _, _ = load_model(run_directory(home, "default"), database.manifest)
    retriever = ChunkRetriever.open(database, LocalRetriever.open(database))
    engine = GenerationEngine(fast_model(model), database.tokenizer, retriever)
    sampling = SamplingConfig(temperature=0.0)
    request = GenerationRequest(prompt=prompt, max_tokens=_SHOWN_CHUNKS * database.chunk_length, sampling=sampling)
    return engine.generate([request])[0].text


def update_as_text(update: Update) -> str:
    """What the demo prints of it."""
    bits = update.result["bits_per_byte"]
    return "\n".join(
        [
            f"Added to a copy of the database: {update.result['documents']} held-out documents. Nothing was trained.",
            f"{bits['before']:8.4f} bits per byte of these documents before",
            f"{bits['after']:8.4f} bits per byte after ({update.result['gain']:.0%} fewer)",
            "",
            *(_paragraph("A held-out document begins", update.prompt)),
            *(_paragraph("and goes on", update.written)),
            *(_paragraph("Before, the model goes on", update.before)),
            *(_paragraph("after, it goes on", update.after)),
        ]
    )


def _paragraph(title: str, text: str) -> list[str]:
    return [f"{title}:", *(f"    {line}" for line in text.strip("\n").splitlines()), ""]
