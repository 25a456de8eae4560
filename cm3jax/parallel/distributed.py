"""Several processes as one program: how they find each other, wait for each other, and notice that one is gone.

The one file that knows JAX's coordination service, which offers bounded waits only through its client object.
"""

import ctypes
import dataclasses
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as _distributed
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

BARRIER_SECONDS = 600.0
# How long a process that failed waits to hear who else did.
ROLL_CALL_SECONDS = 10.0
# Of a process that ends because another one is gone.
EXIT_CODE = 87
_PREFIX = "cm3jax"
_numbers = itertools.count()
_handlers: list[Any] = []  # that C holds pointers to


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
    client: Any = _distributed.global_state.client
    client.key_value_set(f"{_PREFIX}/name/{jax.process_index()}", f"{socket.gethostname()}, pid {os.getpid()}")
    barrier("the start", config.connect_seconds)
    _explain_aborts()
    logger.info("%s of %d", describe(jax.process_index()), jax.process_count())


def barrier(what: str, seconds: float = BARRIER_SECONDS) -> None:
    """Returns when all processes have come here; every process must call this equally often.

    Raises:
      BarrierError: some did not come within `seconds`.
    """
    number = next(_numbers)
    if _distributed.global_state.client is not None:
        _meet(f"{_PREFIX}/barrier/{number}", what, seconds)


def gather(fact: str, what: str, seconds: float = BARRIER_SECONDS) -> list[str]:
    """What every process says, by process number, without any device; every process must call this equally often.

    Raises:
      BarrierError: some did not come within `seconds`; the message has `what`.
    """
    number = next(_numbers)
    client: Any = _distributed.global_state.client
    if client is None:
        return [fact]
    key = f"{_PREFIX}/gather/{number}"
    client.key_value_set(f"{key}/{jax.process_index()}", fact)
    _meet(f"{_PREFIX}/barrier/{number}", what, seconds)
    return [client.key_value_try_get(f"{key}/{i}") for i in range(jax.process_count())]


def _meet(key: str, what: str, seconds: float) -> None:
    client: Any = _distributed.global_state.client
    client.key_value_set(f"{key}/{jax.process_index()}", what)
    try:
        client.wait_at_barrier(key, round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise BarrierError(f"waited {seconds:g} s at {what!r} for {_absent(client, key)}") from error


def _absent(client: Any, key: str) -> str:
    came = {int(name.rsplit("/", 1)[1]) for name, _ in client.key_value_dir_get(key)}
    return ", ".join(describe(i) for i in range(jax.process_count()) if i not in came) or "nobody"


def describe(process: int) -> str:
    """A process by number, host and process id, if it ever said so."""
    client: Any = _distributed.global_state.client
    try:
        return f"process {process} ({client.key_value_try_get(f'{_PREFIX}/name/{process}')})"
    except jax.errors.JaxRuntimeError:
        return f"process {process}"


def leave(error: BaseException) -> NoReturn:
    """Ends this process after an error, with a message that says which process is gone or failed first.

    An orderly exit would wait minutes for processes that will never come.
    """
    client: Any = _distributed.global_state.client
    own = f"{type(error).__name__}: {error}"
    try:
        client.key_value_set(f"{_PREFIX}/error/{jax.process_index()}", own, allow_overwrite=True)
        _meet(f"{_PREFIX}/roll-call", "the roll call after an error", ROLL_CALL_SECONDS)
        errors = dict(client.key_value_dir_get(f"{_PREFIX}/error"))
        others = [f"{describe(int(key.rsplit('/', 1)[1]))}: {text}" for key, text in errors.items() if text != own]
        logger.error("%s%s", own, "".join(f"; {other}" for other in others))
    except BarrierError as absence:
        logger.error("%s; %s", own, absence)
    except jax.errors.JaxRuntimeError as failure:
        logger.error("%s; %s does not answer: %s", own, describe(0), failure)
    _exit()


def _explain_aborts() -> None:
    """Gives the aborts of JAX's service, which say little, a last line that names who is gone.

    The service ends a process from a thread of its own when the first process, which hosts it, is gone, or when another
    one was silent for too long; Python's signal handlers do not run then.
    """
    address: Any = _distributed.global_state.coordinator_address
    host, port = address.rsplit(":", 1)
    leader = describe(0)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(number: int) -> None:
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            message = "another process is gone; the lines above have its number"
        except OSError:
            message = f"{leader} is gone"
        print(f"cm3: {message}", file=sys.stderr, flush=True)
        _exit()

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(int(signal.SIGABRT), ctypes.cast(explain, ctypes.c_void_p))
    _handlers.append(explain)


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


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
