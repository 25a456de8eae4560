"""Plans over epochs without end: sequence i of the training stream, whatever its epoch."""

import bisect
import logging
import os
import pathlib
import threading

from cm3jax import config
from cm3jax.data.mixture import Mixture
from cm3jax.data.packing import Plan
from cm3jax.data.plan import PlanConfig, plan_epoch
from cm3jax.data.plan_file import PlanFileError, read_plan, write_plan
from cm3jax.data.samples import Neighbours, epoch_samples

logger = logging.getLogger(__name__)

# Part of the fingerprint: raise it when the same configuration would give other plans.
VERSION = 1
# Plans kept open; prefetching over the end of an epoch needs two.
KEPT = 2


class Plans:
    """The plan of each epoch, made when first needed. Threads may share it, processes may pickle it.

    Attributes:
      fingerprint: changes when any sequence would.
    """

    def __init__(
        self,
        mixture: Mixture,
        config_: PlanConfig,
        seed: int,
        directory: str | os.PathLike[str] | None = None,
        neighbours: Neighbours | None = None,
    ):
        """Plans for `mixture`.

        Args:
          directory: where plans are kept as memory-mapped files, to be shared by processes and runs; in memory if None.
          neighbours: chooses the documents in front of each query.
        """
        self.mixture, self.config, self.seed = mixture, config_, seed
        self.directory = None if directory is None else pathlib.Path(directory)
        self.neighbours = neighbours
        retrieval = None if neighbours is None else neighbours.fingerprint
        self.fingerprint = config.fingerprint([VERSION, mixture.fingerprint, config.to_dict(config_), seed, retrieval])
        self._lock = threading.Lock()
        self._plans: dict[int, Plan] = {}
        self._starts = [0]  # global index of the first sequence of each epoch seen so far, and of the next one

    def __reduce__(self):
        return Plans, (self.mixture, self.config, self.seed, self.directory, self.neighbours)

    def epoch(self, epoch: int) -> Plan:
        """The plan of one epoch.

        Raises:
          ValueError: no sample fits in a sequence.
        """
        with self._lock:
            return self._epoch(epoch)

    def locate(self, index: int) -> tuple[int, int]:
        """Epoch and index within it of sequence `index` of the stream.

        Epochs differ in length, so this needs the plans of all earlier epochs once.
        """
        if index < 0:
            raise IndexError(f"sequence {index}, expected >= 0")
        with self._lock:
            while index >= self._starts[-1]:
                epoch = len(self._starts) - 1
                self._starts.append(self._starts[-1] + len(self._epoch(epoch)))
            epoch = bisect.bisect_right(self._starts, index) - 1
            return epoch, index - self._starts[epoch]

    def _epoch(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            plan = self._make(epoch) if self.directory is None else self._from_file(self.directory, epoch)
            if not len(plan):
                raise ValueError(f"epoch {epoch} is empty: no sample fits in {self.config.length + 1} tokens")
            while len(self._plans) >= KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = plan
        return self._plans[epoch]

    def _make(self, epoch: int) -> Plan:
        mixture = self.mixture
        samples = epoch_samples(mixture.sizes, mixture.repeats, self.seed, epoch, self.neighbours)
        return plan_epoch(samples, mixture.lengths, self.config, mixture.vocabulary.sentinels, self.seed, epoch)

    def _from_file(self, directory: pathlib.Path, epoch: int) -> Plan:
        path = directory / f"{self.fingerprint}-{epoch:05d}.plan"
        fingerprint = f"{self.fingerprint}-{epoch}"
        try:
            return read_plan(path, fingerprint)
        except FileNotFoundError:
            logger.info("planning epoch %d into %s", epoch, path)
        except PlanFileError as error:
            logger.warning("making a damaged plan again: %s", error)
        write_plan(path, self._make(epoch), fingerprint)
        return read_plan(path, fingerprint)
