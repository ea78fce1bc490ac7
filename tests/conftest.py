"""What all test suites share."""

from __future__ import annotations

import os

import hypothesis
import pytest

# Models and indexes of the tests are so small that threads of torch, FAISS and OpenBLAS only wait for one another, and
# by default they wait computing: for minutes on a busy machine. Read when those are loaded, so here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for the tests that take several, as unit/test_threads.py

# Ray's workers give way to all other processes by default: beside some that keep the processors busy, such as the other
# half of these tests, an actor takes half a minute to start. Read when Ray starts.
os.environ.setdefault("RAY_worker_niceness", "0")

# No test asserts on time: a machine may be busy. Where `CI` is set (by `.ci/run`, too) all examples are those of the
# run before: a change fails for what is in it.
hypothesis.settings.register_profile("retro_ray", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("retro_ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: tests that start a Ray of their own, then those that share one, then all others."""

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("ray") is None:
            return 2
        return 1 if "ray_cluster" in getattr(item, "fixturenames", ()) else 0

    items.sort(key=place)
