"""Where the time of a run goes: every second in exactly one bucket, over all attempts.

An attempt is one process life. The ledger appends spans to `goodput.jsonl`, each a stretch of time without gaps:

    {"attempt": 2, "start": 1767225600.0, "end": 1767225601.5, "from_step": 40, "to_step": 43, "seconds": {"step": 1.5}}

What lies between two attempts is `restart`; steps that an attempt made beyond the checkpoint that the next one began
from were `lost_work`, which only the reader of the file can know.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from cm3jax.files import write_atomic

Bucket = Literal["init", "compile", "data_wait", "step", "save_stall", "eval", "lost_work", "restart"]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)

# Work of an attempt that is repeated if the attempt is thrown back.
_LOSABLE = ("data_wait", "step", "save_stall", "eval")


class Ledger:
    """Books the time since it was made; `init` until told otherwise. `close` books the rest.

    Args:
      path: of the file; None books nothing, for processes other than the first.
      flush_seconds: spans are written when they are at least this long, and at every save.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time, flush_seconds: float = 1.0):
        self._path, self._clock, self._flush_seconds = path, clock, flush_seconds
        self._attempt = 1 + max((span.attempt for span in _repaired(path)), default=0) if path else 1
        self._bucket: Bucket = "init"
        self._start = self._mark = clock()
        self._seconds: dict[Bucket, float] = {}
        self._earlier: dict[Bucket, float] = {}
        self._from_step: int | None = None
        self._step: int | None = None
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115 (closed by close())

    def enter(self, bucket: Bucket) -> None:
        """Books the time so far and goes on in `bucket`."""
        now = self._clock()
        self._seconds[self._bucket] = self._seconds.get(self._bucket, 0.0) + now - self._mark
        self._bucket, self._mark = bucket, now

    @contextlib.contextmanager
    def within(self, bucket: Bucket) -> Iterator[None]:
        """`bucket` inside, the bucket before it again afterwards."""
        before = self._bucket
        self.enter(bucket)
        try:
            yield
        finally:
            self.enter(before)

    def booked(self, bucket: Bucket) -> float:
        """Seconds of this attempt in `bucket` so far."""
        self.enter(self._bucket)
        return self._earlier.get(bucket, 0.0) + self._seconds.get(bucket, 0.0)

    def begin_at(self, step: int) -> None:
        """The step that this attempt begins from."""
        self._from_step = self._step = step

    def reached(self, step: int, flush: bool = False) -> None:
        """An update is done; with `flush` (after a save) the span ends here."""
        self._step = step
        if flush or self._clock() - self._start >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Ends the span and writes it."""
        self.enter(self._bucket)
        span = Span(self._attempt, self._start, self._mark, self._from_step, self._step, self._seconds)
        self._earlier = {b: self._earlier.get(b, 0.0) + self._seconds.get(b, 0.0) for b in BUCKETS}
        self._start, self._from_step, self._seconds = self._mark, self._step, {}
        if self._file:
            self._file.write(json.dumps(dataclasses.asdict(span)) + "\n")
            self._file.flush()

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of one attempt; times are Unix seconds, steps None before the attempt knows where it begins."""

    attempt: int
    start: float
    end: float
    from_step: int | None
    to_step: int | None
    seconds: dict[Bucket, float]


def read_spans(path: Path) -> list[Span]:
    """All spans of a ledger, in order; a last line cut short by a kill is left out.

    Raises:
      ValueError: a whole line that is no span.
    """
    if not Path(path).exists():
        return []
    *lines, _ = Path(path).read_text(encoding="utf-8").split("\n")
    spans = []
    for number, line in enumerate(lines, start=1):
        try:
            spans.append(Span(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: expected a span, found {line[:80]!r}") from error
    return spans


def _repaired(path: Path) -> list[Span]:
    """All spans; a line cut short is taken off the file, so that the next one does not continue it."""
    path = Path(path)
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write_atomic(path, content[: content.rfind(b"\n") + 1])
    return read_spans(path)


def account(spans: list[Span]) -> dict[Bucket, float]:
    """Seconds in each bucket, of all attempts; they add up to the time from the first start to the last end."""
    totals: dict[Bucket, float] = dict.fromkeys(BUCKETS, 0.0)
    resumed_at = _later_starts(spans)
    for before, span in zip([None, *spans], spans, strict=False):
        if before is not None:
            totals["restart"] += span.start - before.end
        lost = _lost_share(span, resumed_at[span.attempt])
        for bucket, seconds in span.seconds.items():
            share = lost if bucket in _LOSABLE else 0.0
            totals["lost_work"] += share * seconds
            totals[bucket] += (1 - share) * seconds
    return totals


def goodput(totals: dict[Bucket, float]) -> float:
    """Share of the time in which updates were made that lasted."""
    total = sum(totals.values())
    return totals["step"] / total if total else 0.0


def _later_starts(spans: list[Span]) -> dict[int, float]:
    """For each attempt the lowest step that a later attempt began from."""
    begins: dict[int, float] = {}
    for span in spans:
        if begins.get(span.attempt) in (None, float("inf")):
            begins[span.attempt] = float("inf") if span.from_step is None else span.from_step
    lowest, found = float("inf"), {}
    for attempt in sorted(begins, reverse=True):
        found[attempt] = lowest
        lowest = min(lowest, begins[attempt])
    return found


def _lost_share(span: Span, resumed_at: float) -> float:
    """Share of a span's steps that were made again later; a span without steps is lost if it lies beyond them."""
    if span.from_step is None or span.to_step is None or span.to_step <= resumed_at:
        return 0.0
    steps = span.to_step - span.from_step
    return min(1.0, (span.to_step - resumed_at) / steps) if steps else 1.0
