"""Stages of a longer job: each runs once, leaves a record of what it did, and is skipped the next time."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cm3jax.config import ConfigError, fingerprint
from cm3jax.files import write_atomic

logger = logging.getLogger(__name__)


class Stages:
    """Runs functions that write under `directory/NAME`, in order, skipping those that finished before.

    A stage's record, `directory/NAME/done.json`, holds its numbers, its seconds and the fingerprint of its inputs,
    which include the fingerprint of the stage before: a change upstream cannot go unnoticed.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.records: dict[str, dict[str, Any]] = {}
        self._chain = ""

    def run(self, name: str, inputs: Any, function: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Calls `function(directory / name)` unless that is done; returns the numbers it returned.

        Args:
          inputs: JSON values (or a config) that decide what the stage makes.

        Raises:
          ConfigError: the stage was finished with other inputs.
        """
        folder = self.directory / name
        path = folder / "done.json"
        self._chain = fingerprint([self._chain, name, inputs])
        if path.exists():
            record = json.loads(path.read_text())
            if record["inputs"] != self._chain:
                raise ConfigError(
                    f"{folder} was made with other settings ({record['inputs']}, now {self._chain}): "
                    "choose another --workdir, or delete this one"
                )
            logger.info("%s: done before, skipped", name)
        else:
            logger.info("%s: started", name)
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            numbers = function(folder)
            record = {"inputs": self._chain, "seconds": time.perf_counter() - start, "numbers": numbers}
            write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
            logger.info("%s: done in %.0f s", name, record["seconds"])
        self.records[name] = record
        return record["numbers"]
