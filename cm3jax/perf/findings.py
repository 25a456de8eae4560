"""What a check before a run says, as text for people; and how all processes come to say the same."""

import dataclasses
import json
import socket
from collections.abc import Sequence
from typing import Any

from cm3jax.parallel.distributed import gather


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
      check: what was looked at.
      passed: False ends the command with an error.
      found: in words, with units; of a check that failed, who is to blame.
      expected: in words; empty where nothing is.
    """

    check: str
    passed: bool
    found: str
    expected: str = ""


def everyones(fact: Any, what: str, seconds: float) -> list[Any]:
    """`fact`, a JSON value, of every process by number: all processes then judge the same facts.

    Raises:
      BarrierError: a process did not say its fact within `seconds`.
    """
    return [json.loads(text) for text in gather(json.dumps(fact), what, seconds)]


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def named(processes: dict[int, str], hosts: Sequence[str], most: int = 8) -> str:
    """What is said of some processes, each with its number and machine; of many, the first `most`."""
    lines = [f"process {i} ({hosts[i]}): {text}" for i, text in sorted(processes.items())]
    more = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {more} more" if more > 0 else "")


def table(findings: Sequence[Finding]) -> str:
    """The findings in columns."""
    rows = [("check", "", "found", "expected")]
    rows += [(f.check, "ok" if f.passed else "FAILED", f.found, f.expected) for f in findings]
    # A long line of found does not move the last column of all others away.
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)] + [44]
    lines = ("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def failed(findings: Sequence[Finding]) -> list[str]:
    """The names of the checks that failed."""
    return [finding.check for finding in findings if not finding.passed]
