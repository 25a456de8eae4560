"""A run that stands still is ended: stacks of all threads are written, then the process exits with an error.

A hung collective cannot be interrupted from Python, so the process must go; whoever started it starts it again.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

# Told apart from Python's 1 and a signal's 128 + n by whoever restarts the job.
EXIT_CODE = 86


class Watchdog:
    """Context that ends the process when nothing was reported for too long.

    Args:
      stacks: file that the stacks of all threads are appended to, beside standard error.
      clock, leave: of the time and of the way out; tests give their own.
    """

    def __init__(
        self,
        stacks: Path,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
        poll: float = 1.0,
    ):
        self.stacks, self._clock, self._leave, self._poll = stacks, clock, leave, poll
        self._lock = threading.Lock()
        self._doing, self._deadline, self._bound = "nothing", float("inf"), 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect(self, doing: str, within: float) -> None:
        """What is done from now on, and the seconds after which the next call of this is overdue."""
        with self._lock:
            self._doing, self._bound, self._deadline = doing, within, self._clock() + within

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._poll):
            with self._lock:
                late, doing, bound = self._clock() > self._deadline, self._doing, self._bound
            if late:
                self._bark(
                    f"no progress for {bound:g} s while doing: {doing}; stacks of all threads are in {self.stacks}"
                )
                return

    def _bark(self, message: str) -> None:
        logger.error("%s", message)
        with open(self.stacks, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            faulthandler.dump_traceback(file)
        faulthandler.dump_traceback(all_threads=True)
        self._leave(EXIT_CODE)
