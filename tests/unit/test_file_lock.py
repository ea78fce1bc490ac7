"""A lock is held by one process or thread, which is named to the others, and is let go when it dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retro_ray.errors import ConfigError
from retro_ray.file_lock import file_lock

HOLD = """
import sys, time
from pathlib import Path
from retro_ray.errors import ConfigError
from retro_ray.file_lock import file_lock
with file_lock(Path(sys.argv[1]), "holding it", ConfigError):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_holds_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with file_lock(path, "working", ConfigError):
        for _ in range(2):
            with (
                pytest.raises(ConfigError, match=rf"working, process {os.getpid()} on .* since "),
                file_lock(path, "another", ConfigError),
            ):
                pass
    with file_lock(path, "a longer purpose than before", ConfigError):
        pass
    with (
        file_lock(path, "it", ConfigError),
        pytest.raises(ConfigError, match=r"^it, process"),
        file_lock(path, "x", ConfigError),
    ):
        pass


def test_an_unreadable_note_of_the_holder_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with file_lock(path, "working", ConfigError):
        path.write_bytes(b"\xff{")
        with pytest.raises(ConfigError, match="another process"), file_lock(path, "another", ConfigError):
            pass


def test_the_dead_let_go(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"holding it, process {process.pid}"),
            file_lock(path, "another", ConfigError),
        ):
            pass
        process.kill()
        process.wait()
        with file_lock(path, "another", ConfigError):
            pass
