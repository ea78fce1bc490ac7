import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.training.batches import Prefetcher, TrainingBatches
from retro_ray.training.windows import NO_TARGET, Batch, ChunkTable, WindowReader, stored_neighbours
from tests.fakes import write_tiny_database

NUM_CHUNKS, BATCH_SIZE, K = 4, 6, 2


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    return write_tiny_database(tmp_path_factory.mktemp("home"), num_shards=3)


def make(database: Database, **settings) -> TrainingBatches:
    table = ChunkTable(database.segments)
    reader = WindowReader(
        table,
        database,
        neighbours=stored_neighbours(table, database, K),
        end_target=database.tokenizer.eos_id,
    )
    return TrainingBatches(reader, **{"num_chunks": NUM_CHUNKS, "batch_size": BATCH_SIZE, "seed": 3, **settings})


def chunk_of(database: Database, number: int) -> tuple[ChunkStore, int]:
    """Store and row of the chunk `number` of a ChunkTable of all shards."""
    for shard in database.segments:
        if number < shard.num_chunks:
            return shard, number
        number -= shard.num_chunks
    raise AssertionError(number)


def loop_reference(database: Database, chunks_L: np.ndarray) -> dict[str, list]:
    """A window written down token by token, from the rules alone."""
    m = database.chunk_length
    out: dict[str, list] = {"tokens": [], "targets": [], "segments": [], "neighbours": [], "mask": []}
    owner: list[tuple[int, int] | None] = []
    for number in chunks_L:
        if number < 0:
            owner.append(None)
            continue
        shard, row = chunk_of(database, int(number))
        owner.append((shard.chunk_id_base, int(shard.document_of(np.array([row]))[0])))
    segment_of = {}
    for u, number in enumerate(chunks_L):
        if owner[u] is None:
            out["tokens"] += [0] * m
            out["targets"] += [NO_TARGET] * m
            out["segments"] += [-1] * m
            ids = [-1] * K
        else:
            shard, row = chunk_of(database, int(number))
            segment = segment_of.setdefault(owner[u], len(segment_of))
            first, stop = shard.document_rows(owner[u][1])
            document = [
                token
                for r in range(first, stop)
                for token in shard.tokens(np.array([r]))[0][: shard.lengths(np.array([r]))[0]]
            ]
            for i in range(m):
                position = (row - first) * m + i
                real = position < len(document)
                out["tokens"].append(int(document[position]) if real else 0)
                out["segments"].append(segment if real else -1)
                following = (*document, database.tokenizer.eos_id)[position + 1] if real else NO_TARGET
                out["targets"].append(int(following))
            ids = shard.neighbours.gather("chunk_ids", np.array([row]))[0][:K].tolist()
            if u + 1 < len(chunks_L) and owner[u + 1] != owner[u]:
                ids = [-1] * K
        for chunk_id in ids:
            tokens, mask = [0] * (2 * m), [False] * (2 * m)
            if chunk_id >= 0:
                neighbour, row = chunk_of(database, chunk_id)
                document = neighbour.document_of(np.array([row]))[0]
                for half, r in enumerate((row, row + 1)):
                    if r < neighbour.num_chunks and neighbour.document_of(np.array([r]))[0] == document:
                        length = int(neighbour.lengths(np.array([r]))[0])
                        tokens[half * m : half * m + length] = neighbour.tokens(np.array([r]))[0][:length].tolist()
                        mask[half * m : half * m + length] = [True] * length
            out["neighbours"].append(tokens)
            out["mask"].append(mask)
    return out


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))


def test_windows_equal_a_reference_written_token_by_token(database):
    batches = make(database)
    met_end_inside_window = False
    for step in range(2 * batches.num_windows_per_epoch // BATCH_SIZE + 1):
        chunks_BL, share = batches.global_chunks(step), batches.at(step)
        for b, chunks_L in enumerate(chunks_BL):
            want = loop_reference(database, chunks_L)
            assert share.batch.tokens_BT[b].tolist() == want["tokens"]
            assert share.batch.targets_BT[b].tolist() == want["targets"]
            assert share.batch.segments_BT[b].tolist() == want["segments"]
            assert share.batch.neighbours_BLKR[b].flatten(0, 1).tolist() == want["neighbours"]
            assert share.batch.neighbour_mask_BLKR[b].flatten(0, 1).tolist() == want["mask"]
            met_end_inside_window |= max(want["segments"]) > 0
        assert share.num_targets == int((share.batch.targets_BT != NO_TARGET).sum())
    assert met_end_inside_window


def test_a_stored_neighbour_of_the_next_document_never_reaches_it(database):
    """Rule 3 inside a window: what A's last chunk retrieved may be B's text, which B must not read."""
    batches = make(database)
    dropped = 0
    for step in range(batches.num_windows_per_epoch // BATCH_SIZE):
        batch, chunks_BL = batches.at(step).batch, batches.global_chunks(step)
        segments_BL = batch.segments_BT.numpy().reshape(len(chunks_BL), NUM_CHUNKS, -1)[:, :, 0]
        for b, u in zip(*np.nonzero(segments_BL[:, :-1] != segments_BL[:, 1:]), strict=True):
            assert not batch.neighbour_mask_BLKR[b, u].any()
            shard, row = chunk_of(database, int(chunks_BL[b, u]))
            dropped += int((shard.neighbours.gather("chunk_ids", np.array([row]))[0][:K] >= 0).sum())
    assert dropped > 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_together_see_the_batches_of_one(database, world_size):
    alone = make(database, retrieval_dropout=0.5)
    workers = [make(database, retrieval_dropout=0.5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 5, 40):
        shares = [worker.at(step) for worker in workers]
        assert equal(joined([share.batch for share in shares]), alone.at(step).batch)
        assert {share.num_targets for share in shares} == {alone.at(step).num_targets}


def test_a_resumed_run_sees_the_batches_of_an_undisturbed_one(database):
    undisturbed = make(database, retrieval_dropout=0.3)
    steps_per_epoch = undisturbed.num_windows_per_epoch / BATCH_SIZE
    assert steps_per_epoch != int(steps_per_epoch), "a batch must lie across the end of the epoch"
    seen = [undisturbed.at(step) for step in range(int(2.5 * steps_per_epoch))]
    for start in (1, int(steps_per_epoch), len(seen) - 1):
        resumed = make(database, retrieval_dropout=0.3)
        for step in range(start, len(seen)):
            assert equal(resumed.at(step).batch, seen[step].batch)


def test_every_chunk_is_seen_once_per_epoch_in_another_order(database):
    batches = make(database, batch_size=1)
    size = batches.num_windows_per_epoch
    epochs = [
        np.concatenate([batches.global_chunks(step)[0] for step in range(e * size, (e + 1) * size)]) for e in (0, 1)
    ]
    for chunks in epochs:
        assert sorted(chunks[chunks >= 0].tolist()) == list(range(database.manifest.num_chunks))
    assert epochs[0].tolist() != epochs[1].tolist()
    other_seed = make(database, batch_size=1, seed=4)
    assert other_seed.global_chunks(0).tolist() != batches.global_chunks(0).tolist()


def test_a_long_document_does_not_fill_a_batch(tmp_path):
    long = write_tiny_database(tmp_path, num_documents=2, max_words=2000, num_shards=1)
    chunks_BL = make(long, batch_size=4).global_chunks(0)
    in_stream_order = chunks_BL[0, 0] + NUM_CHUNKS * np.arange(4)
    assert chunks_BL[:, 0].tolist() != in_stream_order.tolist()


@settings(max_examples=25, deadline=None)
@given(num_chunks=st.integers(1, 400), batch_size=st.integers(1, 30), step=st.integers(0, 50))
def test_any_window_and_batch_size_fits_any_corpus(database, num_chunks, batch_size, step):
    batches = make(database, num_chunks=num_chunks, batch_size=batch_size)
    chunks_BL = batches.global_chunks(step)
    assert chunks_BL.shape == (batch_size, num_chunks)
    assert chunks_BL.max() < database.manifest.num_chunks
    assert (chunks_BL[:, 0] >= 0).all(), "no window is empty"


def test_retrieval_dropout_hides_all_neighbours_of_a_share_of_the_windows(database):
    def sees(dropout: float) -> np.ndarray:
        batches = make(database, retrieval_dropout=dropout)
        return np.concatenate([batches.at(step).batch.neighbour_mask_BLKR.flatten(1).any(1) for step in range(100)])

    always, half, never = sees(0.0), sees(0.5), sees(1.0)
    assert not never.any()
    assert not (half & ~always).any()
    assert 0.4 < half.sum() / always.sum() < 0.6


def test_retrieval_dropout_may_change_with_the_step(database):
    batches = make(database, retrieval_dropout=lambda step: step / 100)
    sees = [batches.at(step).batch.neighbour_mask_BLKR.flatten(1).any(1).sum() for step in range(101)]
    assert sum(sees[:30]) > 2 * sum(sees[70:])
    assert sees[100] == 0


def test_more_neighbours_than_stored_and_more_workers_than_windows_are_refused(database):
    with pytest.raises(ConfigError, match="--num-neighbours is 9, the database stores 4"):
        stored_neighbours(ChunkTable(database.segments), database, 9)
    with pytest.raises(ConfigError, match="--batch-size is 2, less than the 3 workers"):
        make(database, batch_size=2, world_size=3)


def test_without_chunks_there_is_nothing_to_train_on(tmp_path):
    empty = write_tiny_database(tmp_path, num_documents=0, num_shards=1)
    with pytest.raises(DatabaseError, match="no training chunks"):
        make(empty)


def test_prefetched_batches_are_those_of_the_steps(database):
    batches = make(database)
    with Prefetcher(batches, 3, 9) as steps:
        seen = list(steps)
    assert [share.step for share in seen] == list(range(3, 9))
    assert all(equal(share.batch, make(database).at(share.step).batch) for share in seen)


class FailingBatches:
    def at(self, step: int):
        if step == 2:
            raise DatabaseError("chunk 7 cannot be read")
        return dataclasses.make_dataclass("Share", ["step"])(step)


def test_an_error_of_the_reading_thread_surfaces_where_its_batch_would_have_come():
    seen = []
    with pytest.raises(DatabaseError, match="chunk 7"), Prefetcher(FailingBatches(), 0, 5) as steps:
        seen.extend(share.step for share in steps)
    assert seen == [0, 1]


def test_leaving_early_stops_the_thread(database):
    with Prefetcher(make(database), 0, 10_000) as steps:
        next(iter(steps))
    assert not [thread for thread in threading.enumerate() if thread.name == "batch-prefetcher"]
