"""What all test suites share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# No test asserts on time: a machine may be busy.
hypothesis.settings.register_profile("retro_ray", deadline=None)
hypothesis.settings.load_profile("retro_ray")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this test module's own, in the namespace of retro_ray; on two CPUs, and on the loopback."""
    import ray  # the tests without it do not wait for its import

    from retro_ray.ray_session import NAMESPACE

    # A folder of its own, short enough for the paths of sockets in it.
    temporary = tempfile.mkdtemp(prefix="rr", dir="/tmp")
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=150_000_000,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=temporary,
    )
    yield
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)
