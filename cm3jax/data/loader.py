"""Batches on the host and on the devices. The only file that knows Grain.

There is no state to save: global batch i holds the `batch_size` examples from i * batch_size on, whatever the number of
processes, threads or workers.
"""

import collections
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """Examples by index, without end; each a pure function of its index."""

    def __getitem__(self, index: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How a process reads ahead.

    Attributes:
      threads: that make batches, in each worker; 0 makes a batch when it is asked for.
      workers: processes that make batches; 0 makes them in this process. For work that holds the interpreter's lock.
      ahead: batches kept ready (in each worker).
    """

    threads: int = 2
    workers: int = 0
    ahead: int = 4

    def __post_init__(self):
        if self.threads < 0 or self.workers < 0 or self.ahead < 1:
            raise ValueError(f"expected threads >= 0, workers >= 0, ahead >= 1, found {self}")


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Batch index -> this process's rows of that batch."""

    examples: Examples
    batch_size: int
    process_index: int
    process_count: int

    def __call__(self, batch: int) -> Batch:
        rows = self.batch_size // self.process_count
        first = batch * self.batch_size + self.process_index * rows
        examples = [self.examples[i] for i in range(first, first + rows)]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def batches(
    examples: Examples,
    batch_size: int,
    start: int = 0,
    steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    config: LoaderConfig | None = None,
) -> Iterator[Batch]:
    """This process's rows of global batches `start`, `start + 1`, ...: arrays [batch_size / process_count, ...].

    Args:
      batch_size: of the global batch.
      steps: how many batches; None for no end.
      process_index, process_count: see `process_slot`.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`.
    """
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(f"batch of {batch_size}: no equal share for process {process_index} of {process_count}")
    config = config or LoaderConfig()
    stop = sys.maxsize if steps is None else start + steps
    rows = _Rows(examples, batch_size, process_index, process_count)
    return _iterate(grain.MapDataset.range(start, stop).map(rows), config)


def _iterate(dataset: grain.MapDataset, config: LoaderConfig) -> Iterator[Batch]:
    ahead = config.ahead if config.threads else 0
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ahead))
    if config.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl's own main() parses
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.ahead))
    iterator = iter(stream)
    try:
        yield from iterator
    finally:
        iterator.close()  # else threads live on, and workers leave shared memory behind


def process_slot(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """Which rows this process must feed, as (process_index, process_count) of `batches`.

    Processes that only share a model between them (tensor axis) feed the same rows, so this is not always
    (jax.process_index(), jax.process_count()).

    Args:
      sharding: of the batch; its first axis is split.

    Raises:
      ValueError: this process's devices hold no contiguous, equal share of the rows.
    """
    shards = sharding.addressable_devices_indices_map((batch_size,)).values()
    ranges = sorted({index[0].indices(batch_size)[:2] for index in shards if index is not None})
    first, last = ranges[0][0], ranges[-1][1]
    share = last - first
    contiguous = all(a[1] == b[0] for a, b in zip(ranges[:-1], ranges[1:], strict=True))
    if not contiguous or batch_size % share or first % share:
        raise ValueError(f"this process holds rows {ranges} of {batch_size}, expected one contiguous equal share")
    return first // share, batch_size // share


def device_batches(
    examples: Examples,
    batch_size: int,
    start: int,
    steps: int,
    sharding: jax.sharding.Sharding,
    config: LoaderConfig | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches `start` ... `start + steps - 1`, of which each process makes its own rows."""
    slot = process_slot(sharding, batch_size)
    return prefetch_to_device(batches(examples, batch_size, start, steps, *slot, config), sharding)


def prefetch_to_device(
    batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays from this process's rows; `depth` batches are on the devices, the one in use among them.

    Transfers do not block, so the time spent in `next` is the time waited for the host's data.
    """
    queue: collections.deque[Any] = collections.deque()
    try:
        for batch in batches:
            queue.append({k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()})
            if len(queue) == depth:
                yield queue.popleft()
        while queue:
            yield queue.popleft()
    finally:
        close = getattr(batches, "close", None)
        if close:
            close()
