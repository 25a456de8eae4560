"""Several processes as one program: how they find each other, wait for each other, and notice that one is gone.

The one file that knows JAX's coordination service, which offers bounded waits only through its client object.
"""

import dataclasses
import itertools
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as _distributed
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

BARRIER_SECONDS = 600.0
_PREFIX = "cm3jax"
_numbers = itertools.count()


class BarrierError(RuntimeError):
    """Processes that did not come to a meeting point in time; the message names them."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other.

    Attributes:
      coordinator: HOST:PORT of process 0; None asks the cluster (TPU pod, SLURM, Kubernetes, MPI).
      processes, process: how many there are and which this one is; None asks the cluster.
      connect_seconds: how long a process waits for the others at start.
      heartbeat_seconds: silence after which a process counts as dead and the others are ended.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    connect_seconds: int = 600
    heartbeat_seconds: int = 60


def from_environment(environment: Mapping[str, str]) -> DistributedConfig | None:
    """What the launch scripts say; None if this process is alone.

    `CM3_PROCESSES`, `CM3_PROCESS` and `CM3_COORDINATOR` name a process outright; `CM3_CLUSTER=1` leaves it to the
    cluster's own variables. `CM3_CONNECT_SECONDS` and `CM3_HEARTBEAT_SECONDS` change the bounds.

    Raises:
      ValueError: a variable is missing or is no number.
    """
    if "CM3_PROCESSES" not in environment and environment.get("CM3_CLUSTER", "") in ("", "0"):
        return None
    config = DistributedConfig(
        connect_seconds=_number(environment, "CM3_CONNECT_SECONDS", DistributedConfig.connect_seconds),
        heartbeat_seconds=_number(environment, "CM3_HEARTBEAT_SECONDS", DistributedConfig.heartbeat_seconds),
    )
    if "CM3_PROCESSES" not in environment:
        return config
    if not environment.get("CM3_COORDINATOR"):
        raise ValueError("CM3_PROCESSES is set, but CM3_COORDINATOR (HOST:PORT of process 0) is not")
    processes, process = (_number(environment, name) for name in ("CM3_PROCESSES", "CM3_PROCESS"))
    if not 0 <= process < processes:
        raise ValueError(f"CM3_PROCESS is {process}, expected 0 to {processes - 1}")
    return dataclasses.replace(config, coordinator=environment["CM3_COORDINATOR"], processes=processes, process=process)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return int(value)


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes; must come before anything asks JAX for devices."""
    # The service would take SIGTERM for itself and ask for a sync at every step; see `agreement`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        config.coordinator,
        config.processes,
        config.process,
        initialization_timeout=config.connect_seconds,
        heartbeat_timeout_seconds=config.heartbeat_seconds,
    )
    publish("name", f"{socket.gethostname()}, pid {os.getpid()}")
    barrier("the start", config.connect_seconds)
    logger.info("%s of %d", describe(jax.process_index()), jax.process_count())


def barrier(what: str, seconds: float = BARRIER_SECONDS) -> None:
    """Returns when all processes have come here; every process must call this equally often.

    Raises:
      BarrierError: some did not come within `seconds`.
    """
    number = next(_numbers)
    if _client() is not None:
        meet(f"barrier/{number}", what, seconds)


def gather(fact: str, what: str, seconds: float = BARRIER_SECONDS) -> list[str]:
    """What every process says, by process number, without any device; every process must call this equally often.

    Raises:
      BarrierError: some did not come within `seconds`; the message has `what`.
    """
    number = next(_numbers)
    if _client() is None:
        return [fact]
    publish(f"gather/{number}", fact)
    meet(f"barrier/{number}", what, seconds)
    said = published(f"gather/{number}")
    return [said[i] for i in range(jax.process_count())]


def meet(topic: str, what: str, seconds: float) -> None:
    """A barrier by name, for processes that may not have passed the same barriers before.

    Raises:
      BarrierError: as `barrier`.
    """
    publish(topic, what)
    try:
        _client().wait_at_barrier(f"{_PREFIX}/{topic}", round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = published(topic)
        absent = ", ".join(describe(i) for i in range(jax.process_count()) if i not in came)
        raise BarrierError(f"waited {seconds:g} s at {what!r} for {absent or 'nobody'}") from error


def publish(topic: str, text: str) -> None:
    """Says `text` about `topic` in the name of this process; the last word counts."""
    _client().key_value_set(f"{_PREFIX}/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def published(topic: str) -> dict[int, str]:
    """What each process said about `topic`, of those that did."""
    return {int(key.rsplit("/", 1)[1]): text for key, text in _client().key_value_dir_get(f"{_PREFIX}/{topic}")}


def describe(process: int) -> str:
    """A process by number, host and process id, if it ever said so."""
    try:
        return f"process {process} ({_client().key_value_try_get(f'{_PREFIX}/name/{process}')})"
    except jax.errors.JaxRuntimeError:
        return f"process {process}"


def leader_address() -> tuple[str, int]:
    """Host and port of the service that the first process runs."""
    address: Any = _distributed.global_state.coordinator_address
    host, port = address.rsplit(":", 1)
    return host, int(port)


def _client() -> Any:
    return _distributed.global_state.client


def all_processes(fact: bool) -> bool:
    """Whether `fact` holds in every process."""
    if jax.process_count() == 1:
        return fact
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fact))))


def first_process(fact: bool) -> bool:
    """What the first process says, in every process."""
    if jax.process_count() == 1:
        return fact
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(fact)))
