"""The Ray that the integration tests share: starting one takes as long as most of what is tested on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from retro_ray.building import embed_units
from retro_ray.building.build import DatabaseBuilder
from retro_ray.config import CorpusConfig
from retro_ray.ray_session import NAMESPACE, connect
from tests.integration.small_corpus import CONFIG, Built, write_corpus


@pytest.fixture(scope="package")
def _started_ray() -> Iterator[None]:
    """Two CPUs, however many the machine has: what is tested on it depends on their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
        connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(_started_ray: None) -> Iterator[str]:
    """The address of a Ray cluster on the loopback, as the jobs start it, without shard actors of other modules."""
    yield ray.get_runtime_context().gcs_address
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE:
            ray.kill(ray.get_actor(actor["name"], NAMESPACE))


@pytest.fixture
def one_cpu(ray_cluster: str) -> Iterator[None]:
    """Holds one of the cluster's two CPUs, so that a build has one embedder and a training worker one thread."""

    class Occupant:
        pass

    occupant = ray.remote(Occupant).options(num_cpus=1).remote()
    ray.get(occupant.__ray_ready__.remote())
    yield
    ray.kill(occupant)


@pytest.fixture(scope="package")
def built(tmp_path_factory: pytest.TempPathFactory, _started_ray: None) -> Built:
    """The database of the small corpus. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("built")
    documents = write_corpus(folder / "in")
    corpus = CorpusConfig(input=(str(folder / "in"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_units, "_CHUNKS_WORTH_AN_EMBEDDER", 1)  # so by two; all other builds of it by one
        manifest = DatabaseBuilder(folder / "home", corpus, CONFIG).run()
    return Built(folder / "home", corpus, documents, manifest)
