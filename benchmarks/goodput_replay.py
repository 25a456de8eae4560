"""What a long run would lose to failures, replayed through the ledger that real runs keep.

Llama 3 (arXiv 2407.21783, section 3.3.4) met 419 unexpected interruptions in 54 days. They are replayed at random
moments on a run whose costs were measured: stall of a save, start and compilation of an attempt, time between two. The
time between saves is the one that loses least (Young 1974): sqrt(2 x time between failures x stall).

    python benchmarks/goodput_replay.py --run runs/lm [--restart-seconds 60] [--out benchmarks/results/NAME.md]
"""

import argparse
import dataclasses
import datetime
import math
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np

from cm3jax.reliability.goodput import BUCKETS, Ledger, account, goodput, read_spans

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds: of a save's stall, of an attempt's start (init and compile), and between two attempts."""

    stall: float
    start: float
    between: float


@dataclasses.dataclass(frozen=True)
class Failures:
    """How many failures in how many days."""

    count: int = 419
    days: float = 54.0

    @property
    def seconds_between(self) -> float:
        return self.days * DAY / self.count


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(run: Path) -> Costs:
    """Costs that the ledger of a run shows.

    Raises:
      ValueError: the run saved nothing.
    """
    spans = read_spans(run / "goodput.jsonl")
    totals = account(spans)
    attempts = len({span.attempt for span in spans})
    saves = sum(1 for span in spans if span.seconds.get("save_stall"))
    if not saves:
        raise ValueError(f"{run}: no save in goodput.jsonl")
    between = totals["restart"] / (attempts - 1) if attempts > 1 else 0.0
    return Costs(totals["save_stall"] / saves, (totals["init"] + totals["compile"]) / attempts, between)


def replay(costs: Costs, failures: Failures, interval: float, seed: int = 0) -> dict[str, float]:
    """Seconds in each bucket of a run that saves every `interval` seconds and fails as told.

    A step is as long as an interval here: only where the saves lie matters for what is lost.
    """
    rng = np.random.default_rng(seed)
    moments = np.sort(rng.uniform(0, failures.days * DAY, failures.count))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "goodput.jsonl"
        saved = 0
        for end in [*moments, failures.days * DAY]:
            saved = _attempt(path, clock, costs, interval, saved, end)
        return account(read_spans(path))


def _attempt(path: Path, clock: _Clock, costs: Costs, interval: float, saved: int, end: float) -> int:
    """One process life, which ends at `end` whatever it does; returns the saved step. Steps count milliseconds."""
    clock.now = min(clock.now + (costs.between if clock.now else 0.0), end)
    ledger = Ledger(path, clock)
    clock.now = min(clock.now + costs.start, end)
    ledger.begin_at(saved)
    while clock.now < end:
        ledger.enter("step")
        worked = min(interval, end - clock.now)
        clock.now += worked
        step = saved + round(worked * 1000)
        if clock.now + costs.stall >= end:
            ledger.reached(step, flush=True)
            clock.now = end
            break
        with ledger.within("save_stall"):
            clock.now += costs.stall
        ledger.reached(step, flush=True)
        saved = step
    ledger.close()
    return saved


def report(costs: Costs, failures: Failures, origin: str) -> str:
    """A table in Markdown."""
    interval = math.sqrt(2 * failures.seconds_between * costs.stall)
    lines = [
        f"# Replay of {failures.count} failures in {failures.days:g} days",
        "",
        f"`{shlex.join(['python', *sys.argv])}`, {datetime.date.today()}",
        "",
        f"Costs {origin} ({platform.machine()}): save stall {costs.stall:.3f} s, start and "
        f"compilation {costs.start:.1f} s, between attempts {costs.between:.1f} s.",
        "",
        f"| saves every | goodput | {' | '.join(BUCKETS)} |",
        f"| --- | --- |{' --- |' * len(BUCKETS)}",
    ]
    for seconds in (interval, 300.0, 900.0, 3600.0):
        totals = replay(costs, failures, seconds)
        total = sum(totals.values())
        shares = " | ".join(f"{totals[bucket] / total:.2%}" for bucket in BUCKETS)
        best = " (best)" if seconds == interval else ""
        lines.append(f"| {seconds:.0f} s{best} | {goodput(totals):.2%} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory whose ledger has the costs")
    parser.add_argument("--restart-seconds", type=float, help="between attempts, instead of what the run shows")
    parser.add_argument("--out", type=Path, help="file for the table, beside standard output")
    options = parser.parse_args()
    costs = measured(options.run)
    if options.restart_seconds is not None:
        costs = dataclasses.replace(costs, between=options.restart_seconds)
    text = report(costs, Failures(), f"measured in {options.run.name}")
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
