"""How a process ends when another one is gone: soon, and with a message that names it.

Three ways lead here. A collective fails and Python sees an error: `leave` calls the roll. The first process, which
hosts JAX's coordination service, is gone: the service aborts the others at once. A process was silent for too long: the
service aborts all. Aborts come from a thread of the service's own, where Python's signal handlers do not run, and say
little; `Peers` gives them a last line.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NoReturn

import jax

from cm3jax.parallel.distributed import (
    BarrierError,
    DistributedConfig,
    describe,
    initialize,
    leader_address,
    meet,
    publish,
    published,
)

logger = logging.getLogger(__name__)

# How long a process that failed waits to hear who else did.
ROLL_CALL_SECONDS = 10.0
# Of a process that ends because another one is gone.
EXIT_CODE = 87


@contextlib.contextmanager
def joined(group: DistributedConfig | None) -> Iterator[None]:
    """The inside is done as one of the processes of `group`, and an error in it ends this process by `leave`.

    With None, the process is alone and nothing is done.
    """
    if group is None:
        yield
        return
    initialize(group)
    with Peers(group.heartbeat_seconds) as peers:
        try:
            yield
        except BaseException as error:
            logger.debug("failed", exc_info=True)
            leave(error, peers.names)


def leave(error: BaseException, names: Sequence[str]) -> NoReturn:
    """Ends this process after an error, with a message that says which process is gone or failed, too.

    An orderly exit would wait minutes for processes that will never come.

    Args:
      names: of all processes, asked for in time: it may be the first process that is gone, and all names with it.
    """
    own = f"{type(error).__name__}: {error}"
    try:
        publish("error", own)
        meet("roll-call", "the roll call after an error", ROLL_CALL_SECONDS)
        others = [f"{names[i]}: {text}" for i, text in published("error").items() if text != own]
        logger.error("%s", "; ".join([own, *others]))
    except BarrierError as absence:
        logger.error("%s; %s", own, absence)
    except jax.errors.JaxRuntimeError as failure:
        logger.error("%s; %s does not answer: %s", own, names[0], failure)
    _exit()


class Peers:
    """Context that listens to the other processes and explains an abort by the silence of one of them.

    Attributes:
      names: of all processes.

    Args:
      heartbeat_seconds: silence after which the service aborts.
    """

    def __init__(self, heartbeat_seconds: float):
        self._pause = heartbeat_seconds / 5
        self.names = [describe(i) for i in range(jax.process_count())]
        self._heard: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._explain)

    def __enter__(self) -> "Peers":
        self._thread.start()
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(int(signal.SIGABRT), ctypes.cast(self._handler, ctypes.c_void_p))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The abort handler stays: the service may still abort while the processes part.
        self._ended.set()
        self._thread.join()

    def _listen(self) -> None:
        beat = 0
        while not self._ended.wait(self._pause):
            beat += 1
            try:
                publish("alive", str(beat))
                for process, word in published("alive").items():
                    if self._heard.get(process, ("", 0.0))[0] != word:
                        self._heard[process] = (word, time.monotonic())
            except jax.errors.JaxRuntimeError:
                return  # the service is gone, and will end this process

    def _explain(self, number: int) -> None:
        try:
            socket.create_connection(leader_address(), timeout=2).close()
            latest = time.monotonic() - 2.5 * self._pause
            silent = [self.names[i] for i, (_, at) in sorted(self._heard.items()) if at < latest]
            message = f"{', '.join(silent) or 'another process'} fell silent"
        except OSError:
            message = f"{self.names[0]} is gone"
        print(f"cm3: {message}", file=sys.stderr, flush=True)
        _exit()


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
