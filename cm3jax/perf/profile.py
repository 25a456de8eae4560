"""A trace of a few updates, for TensorBoard's profiler or Perfetto."""

import logging
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

# Updates before the trace begins: the first ones warm caches and fill queues.
WARM_UP = 5


class Profile:
    """Traces `updates` updates into `folder`, after a warm-up; nothing if `updates` is 0."""

    def __init__(self, folder: Path, updates: int):
        self._folder, self._updates, self._seen = folder, updates, 0

    def before_update(self) -> None:
        if self._updates and self._seen == WARM_UP:
            jax.profiler.start_trace(str(self._folder))
        self._seen += 1

    def after_update(self, outputs: jax.Array) -> None:
        """Waits for `outputs` once, at the end of the trace."""
        if self._updates and self._seen == WARM_UP + self._updates:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            logger.info("trace of %d updates: %s", self._updates, self._folder)
