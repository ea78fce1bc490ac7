"""Edits of a database that shard actors serve, while clients search it; and a build that finds it edited."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.store import Database
from retro_ray.retrieval.announce import announce_commit
from retro_ray.retrieval.shard_actor import refresh_shard_actors, stop_shard_actors
from retro_ray.retrieval.sharded import ShardedRetriever
from tests.unit.building.editing import HashEmbedder, document, write_database

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
NUM_CLIENTS = 3


@pytest.fixture
def home(tmp_path: Path, ray_cluster: None) -> Iterator[Path]:
    database = write_database(tmp_path, [document(f"d{number}") for number in range(10)])
    yield tmp_path
    stop_shard_actors(database.directory)


class Client(threading.Thread):
    """Asks for everything there is, again and again, and notes what may not be."""

    def __init__(self, home: Path, forbidden: set[str], required: set[str]) -> None:
        super().__init__()
        self._retriever = ShardedRetriever(Database.open(home))
        self._forbidden, self._required = forbidden, required
        self._stopping = threading.Event()
        self.num_answers = 0
        self.problems: list[str] = []

    def run(self) -> None:
        queries = HashEmbedder().embed([f"query {number}" for number in range(3)])
        try:
            while not self._stopping.is_set():
                # What was deleted, or added, when the search began; sets only grow while a test runs.
                forbidden, required = set(self._forbidden), set(self._required)
                found = self._retriever.search(queries, 200)
                for refs in found.documents:
                    ids = {ref.id for ref in refs if ref is not None}
                    self.problems += [f"deleted {name} seen" for name in ids & forbidden]
                    self.problems += [f"added {name} missing" for name in required - ids]
                self.num_answers += 1
        except Exception as error:
            self.problems.append(repr(error))
            raise

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def test_clients_see_every_edit_from_the_moment_it_returned(home: Path) -> None:
    forbidden: set[str] = set()
    required: set[str] = set()
    clients = [Client(home, forbidden, required) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    editor = DatabaseEditor(home, embedder=HashEmbedder(), announce=announce_commit)
    for round_number in range(3):
        new = f"new {round_number}"
        editor.add([document(new), document(f"d{round_number} again")])
        required |= {new, f"d{round_number} again"}
        editor.delete([f"d{round_number}"])
        forbidden |= {f"d{round_number}"}
        editor.update([document(new, "omicron " * 30), document("d9", "pi " * (round_number + 1))])
        if round_number == 1:
            editor.compact(num_shards=3)
    counts = [client.num_answers for client in clients]
    for client, count in zip(clients, counts, strict=True):
        while client.num_answers <= count + 1 and not client.problems:
            time.sleep(0.01)
    for client in clients:
        client.stop()
    assert [client.problems for client in clients] == [[]] * NUM_CLIENTS
    assert Database.open(home).manifest.generation == 11


def test_an_announced_edit_is_loaded_when_it_returns(home: Path) -> None:
    database = Database.open(home)
    retriever = ShardedRetriever(database)
    retriever.wait_until_ready()
    editor = DatabaseEditor(home, embedder=HashEmbedder(), announce=announce_commit)
    editor.add([document("new")])
    assert refresh_shard_actors(database.directory) == database.manifest.num_shards
    store = Database.open(home).segments[-1]
    found = retriever.search(store.keys, 1)
    np.testing.assert_array_equal(found.chunk_ids[:, 0], store.chunk_id_base + np.arange(store.num_chunks))
