import asyncio
import logging
import os
import shutil
from pathlib import Path

import pytest

from retro_ray.errors import CheckpointError
from retro_ray.serve.checkpoint_watch import CheckpointWatch
from retro_ray.training.checkpoint import META_NAME, checkpoints_directory


def write_checkpoint(run: Path, step: int, *, time_ns: int = 1) -> Path:
    folder = checkpoints_directory(run) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / META_NAME).write_text("{}")
    os.utime(folder / META_NAME, ns=(time_ns, time_ns))
    return folder


def test_what_is_there_at_first_is_not_new_and_each_newer_one_is_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    watch = CheckpointWatch(tmp_path)
    assert watch.newer() is None
    newer = write_checkpoint(tmp_path, 3)
    assert watch.newer() == newer
    assert watch.newer() is None


def test_a_run_that_is_started_anew_counts_from_the_beginning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 500)
    watch = CheckpointWatch(tmp_path)
    shutil.rmtree(checkpoints_directory(tmp_path))
    assert watch.newer() is None
    first = write_checkpoint(tmp_path, 100, time_ns=2)
    assert watch.newer() == first
    shutil.rmtree(first)
    again = write_checkpoint(tmp_path, 500, time_ns=3)  # the same name as the one at first
    assert watch.newer() == again


def test_a_folder_that_is_not_whole_is_no_checkpoint(tmp_path: Path) -> None:
    watch = CheckpointWatch(tmp_path / "not there yet")
    assert watch.newer() is None
    watch = CheckpointWatch(tmp_path)
    (checkpoints_directory(tmp_path) / "step-00000001").mkdir(parents=True)
    (checkpoints_directory(tmp_path) / ".tmp-5-00000002").mkdir()
    assert watch.newer() is None


def test_one_that_cannot_be_used_is_named_once_and_the_next_is_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watch = CheckpointWatch(tmp_path)
    tried: list[str] = []

    def load(folder: Path) -> str:
        tried.append(folder.name)
        if len(tried) == 1:
            write_checkpoint(tmp_path, 2)
            raise CheckpointError("it is torn")
        return folder.name

    async def run() -> None:
        taken_up: asyncio.Queue[str] = asyncio.Queue()
        following = asyncio.create_task(watch.follow(load, taken_up.put_nowait, interval_s=0.001))
        write_checkpoint(tmp_path, 1)
        assert await taken_up.get() == "step-00000002"
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert taken_up.empty()
        following.cancel()

    asyncio.run(run())
    assert tried == ["step-00000001", "step-00000002"]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("retro_ray")] == [
        "the checkpoint step-00000001 is not taken up: it is torn",
        "the checkpoint step-00000002 is served from now on",
    ]
