"""What all test suites share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

# No test asserts on time: a machine may be busy.
hypothesis.settings.register_profile("retro_ray", deadline=None)
hypothesis.settings.load_profile("retro_ray")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this test module's own, on the loopback, as the jobs start it."""
    import ray  # the tests without it do not wait for its import

    from retro_ray.ray_session import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        connect()
    yield
    ray.shutdown()
