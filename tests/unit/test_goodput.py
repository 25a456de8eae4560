"""The ledger of a run's time: every second in one bucket, over restarts, kills and lost work."""

import json

import numpy as np
import pytest

from cm3jax.reliability.goodput import BUCKETS, Ledger, account, goodput, read_spans


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "goodput.jsonl"


def attempt(path, clock, start, stop, *, save_every=5, killed=False):
    """An attempt of 2 s init, 3 s compile, then 1 s data and 4 s compute a step, 0.5 s a save, 7 s of evaluation."""
    ledger = Ledger(path, clock)
    clock.pass_(2)
    ledger.begin_at(start)
    with ledger.within("compile"):
        clock.pass_(3)
    for step in range(start + 1, stop + 1):
        ledger.enter("data_wait")
        clock.pass_(1)
        ledger.enter("step")
        clock.pass_(4)
        ledger.reached(step)
        if step % save_every == 0:
            with ledger.within("save_stall"):
                clock.pass_(0.5)
            ledger.reached(step, flush=True)
    if killed:
        clock.pass_(2.5)  # of an update that nobody heard of
        ledger._file.close()
        return
    with ledger.within("eval"):
        clock.pass_(7)
    ledger.close()


def test_one_attempt(path, clock):
    attempt(path, clock, 0, 10)
    totals = account(read_spans(path))
    expected = {"init": 2, "compile": 3, "data_wait": 10, "step": 40, "save_stall": 1, "eval": 7}
    assert totals == dict.fromkeys(BUCKETS, 0.0) | expected
    assert goodput(totals) == 40 / 63


def test_a_kill_loses_the_steps_after_the_checkpoint_and_nothing_else(path, clock):
    attempt(path, clock, 0, 8, killed=True)  # saved at 5; 6, 7, 8 are made again
    clock.pass_(30)
    attempt(path, clock, 5, 10)
    totals = account(read_spans(path))
    assert totals["lost_work"] == pytest.approx(3 * 5)
    assert totals["step"] == pytest.approx(10 * 4) and totals["data_wait"] == pytest.approx(10)
    assert totals["restart"] == pytest.approx(30 + 2.5)
    assert (totals["init"], totals["compile"], totals["save_stall"]) == (4, 6, 1)
    assert sum(totals.values()) == pytest.approx(clock.now - 1000.0)


def test_an_attempt_that_ends_before_it_begins_loses_nothing(path, clock):
    attempt(path, clock, 0, 6)
    ledger = Ledger(path, clock)
    clock.pass_(9)
    ledger.flush()  # and killed while restoring
    ledger._file.close()
    attempt(path, clock, 5, 6)
    totals = account(read_spans(path))
    assert totals["lost_work"] == pytest.approx(5 + 7)  # step 6 and the evaluation after it
    assert totals["init"] == 2 + 9 + 2


def test_work_thrown_back_twice_is_lost_once_each(path, clock):
    attempt(path, clock, 0, 7, killed=True)
    attempt(path, clock, 5, 9, killed=True)
    attempt(path, clock, 5, 10)
    totals = account(read_spans(path))
    assert totals["lost_work"] == pytest.approx((2 + 4) * 5)
    assert totals["step"] == pytest.approx(10 * 4)


@pytest.mark.parametrize("seed", range(20))
def test_every_second_is_in_exactly_one_bucket(path, clock, seed):
    """Random attempts, killed anywhere: the buckets add up to the wall clock."""
    rng = np.random.default_rng(seed)
    saved = 0
    for _ in range(6):
        reached = saved + int(rng.integers(0, 12))
        attempt(path, clock, saved, reached, killed=bool(rng.integers(2)))
        clock.pass_(float(rng.uniform(0, 20)))
        saved = reached - reached % 5 if reached >= saved + 5 else saved
    attempt(path, clock, saved, saved + 3)
    totals = account(read_spans(path))
    assert sum(totals.values()) == pytest.approx(clock.now - 1000.0, rel=1e-9)
    assert min(totals.values()) >= 0
    assert totals["step"] == pytest.approx(4.0 * (saved + 3))


def test_a_torn_line_is_left_out_and_not_continued(path, clock):
    attempt(path, clock, 0, 5)
    whole = path.read_text()
    path.write_text(whole + '{"attempt": 1, "sta')
    assert len(read_spans(path)) == whole.count("\n")
    attempt(path, clock, 5, 10)
    assert [json.loads(line)["attempt"] for line in path.read_text().splitlines()][-1] == 2


def test_a_line_that_is_no_span_is_named(path):
    path.write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match=r"goodput.jsonl:1: expected a span, found '\{\"step\": 3\}'"):
        read_spans(path)


def test_other_processes_book_but_write_nothing(clock):
    with Ledger(None, clock) as ledger:
        ledger.enter("step")
        clock.pass_(5)
        ledger.enter("data_wait")
        ledger.flush()
        assert ledger.booked("step") == 5
