"""Connecting to Ray, and reading what failed on it."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray._private import ray_constants, services
from ray.exceptions import AuthenticationError, RayError

from retro_ray.errors import ConfigError, DatabaseError, RetroRayError
from retro_ray.progress import progress_bar

logger = logging.getLogger(__name__)

NAMESPACE = "retro_ray"
"""Where the detached shard actors are found by every job, training run and service."""
_OBJECT_STORE_BYTES = 1 << 30
_PROBE_TIMEOUT_S = 2.0
_SETTLING_S = 1.0
"""What Ray says is free lags behind tasks that have just ended: by a tenth of this where it was measured."""
_POLL_S = 0.02
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def connect() -> None:
    """Connect to the running Ray cluster, else start one on this machine's loopback.

    `RAY_ADDRESS` names the cluster; `RAY_ADDRESS=local` always starts one that ends with this process.
    """
    if ray.is_initialized() or connect_if_running():
        return
    _keep_to_loopback()
    # A token of this cluster's own. Ray would write one into the home folder, and a `ray start` that finds it
    # there asks every later `ray job submit` for it.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        **_quiet(),
    )


def connect_if_running() -> bool:
    """Connect to the running Ray cluster; False where there is none that lets this process in.

    Raises:
        ConfigError: `RAY_ADDRESS` names a cluster that does not answer, or asks for a token.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") not in ("", "auto")
    try:
        address = services.canonicalize_bootstrap_address("auto")
    except ConnectionError:  # none has run since the machine started
        address = None
    if address is None or not _answers(address):
        # A Ray that was killed leaves its address behind; Ray itself would try it for minutes.
        if address is not None and named:
            raise ConfigError(f"RAY_ADDRESS is {address}, where nothing answers: start Ray there, or unset it")
        return False
    try:
        ray.init(address=address, namespace=NAMESPACE, **_quiet())
    except AuthenticationError as error:
        message = (
            f"the Ray cluster at {address} asks for a token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN let jobs use it"
        )
        if named:
            raise ConfigError(message) from error
        logger.warning("%s; doing without it", message)
        return False
    return True


def _answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def _keep_to_loopback() -> None:
    """Let the Ray that this process starts listen on 127.0.0.1 alone.

    Where Ray could serve a cluster it replaces a loopback address by the machine's own, and listens on
    all of its networks.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes it starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read the variable already


def _quiet() -> dict[str, Any]:
    """What workers print is not repeated here, unless `RETRO_RAY_WORKER_LOGS` asks for it."""
    return {"log_to_driver": bool(os.environ.get("RETRO_RAY_WORKER_LOGS")), "logging_level": logging.WARNING}


def num_cluster_cpus() -> int:
    """CPUs of all nodes, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_free(kind: Literal["CPU", "GPU"]) -> int:
    """Of all nodes, what nothing else on the cluster has reserved now.

    Actors beyond these would wait for a service or another job to end.
    """
    until = time.monotonic() + _SETTLING_S
    while True:
        free = int(ray.available_resources().get(kind, 0))
        if free >= int(ray.cluster_resources().get(kind, 0)) or time.monotonic() >= until:
            return free
        time.sleep(_POLL_S)


def num_free_cpus() -> int:
    """CPUs that are free, at least 1; says so if there is none."""
    free = num_free("CPU")
    if free < 1:
        logger.warning("all CPUs of the Ray cluster are in use: waiting for one (`ray status` shows by whom)")
    return max(1, free)


def num_cluster_gpus() -> int:
    """GPUs of all nodes."""
    return int(ray.cluster_resources().get("GPU", 0))


def run_tasks(
    function: Any, arguments: Sequence[tuple], description: str, max_in_flight: int | None = None
) -> Iterator[Any]:
    """Run a remote function once per tuple of arguments; yields results as they come, behind a progress bar."""
    max_in_flight = max_in_flight or 2 * num_cluster_cpus()
    waiting = list(reversed(arguments))
    running: list[ray.ObjectRef] = []
    with progress_bar(len(arguments), description) as bar:
        while waiting or running:
            while waiting and len(running) < max_in_flight:
                running.append(function.remote(*waiting.pop()))
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])
            bar.update()


def user_error(error: BaseException, home: Path) -> RetroRayError | None:
    """What a user can mend behind an error that crossed Ray's processes; None where there is nothing.

    Looks through the causes that Ray wraps around what a task raised.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        # Ray raises a task's error with the error's own class, but with a traceback for its message.
        if isinstance(current, RetroRayError) and not isinstance(current, RayError):
            return current
        if isinstance(current, OSError) and current.errno in _NO_SPACE:
            return DatabaseError(
                f"no space left while writing under {home} ({os.strerror(current.errno)}): free some or pass another "
                "--home, and start again; what was there before is untouched, and finished work is kept"
            )
        pending += [getattr(current, "cause", None), current.__cause__, current.__context__]
    return None
