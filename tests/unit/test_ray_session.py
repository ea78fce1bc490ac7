"""Whether a cluster runs; connecting to one is tested where there is one."""

import socket

import pytest
from ray._private import services

from retro_ray.errors import ConfigError
from retro_ray.ray_session import connect_if_running


@pytest.fixture
def nobody_listens() -> str:
    with socket.socket() as closed_again:
        closed_again.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{closed_again.getsockname()[1]}"


def leave_behind(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """What Ray finds on the machine: the address of the last cluster, and none that runs."""
    monkeypatch.setattr(services, "find_gcs_addresses", lambda *_: set())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda *_: address)


@pytest.mark.parametrize("named", [None, "", "auto"])
def test_on_a_machine_on_which_ray_has_never_run(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    leave_behind(monkeypatch, None)
    if named is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", named)
    assert not connect_if_running()


def test_a_cluster_that_was_killed(monkeypatch: pytest.MonkeyPatch, nobody_listens: str) -> None:
    leave_behind(monkeypatch, nobody_listens)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not connect_if_running()


def test_a_named_cluster_must_answer(monkeypatch: pytest.MonkeyPatch, nobody_listens: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody_listens)
    _, port = nobody_listens.split(":")  # Ray may put another of the machine's addresses in front
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS is .*:{port}, where nothing answers"):
        connect_if_running()
