"""The log of documents that a job left out, and how many it may leave out."""

import dataclasses
import json
from typing import Any

from cm3jax.data.sources.source import Reason


class TooManyRejectsError(ValueError):
    """More documents were refused than the job allows: the data or the options are wrong."""


@dataclasses.dataclass(frozen=True)
class Reject:
    """One refused document: its index and id in the source, and why."""

    index: int
    key: str
    reason: Reason
    detail: str

    def line(self) -> str:
        """One line of `rejects.jsonl`."""
        fields: dict[str, Any] = {**dataclasses.asdict(self), "reason": str(self.reason)}
        return json.dumps(fields) + "\n"


def allowed_rejects(documents: int, share: float) -> int:
    """How many of `documents` may be refused.

    Raises:
      ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"max_reject_share {share}, expected 0 <= share <= 1")
    return int(share * documents)
