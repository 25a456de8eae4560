"""A run that stands still is ended, and only such a run."""

import subprocess
import sys
import time

from cm3jax.reliability.watchdog import EXIT_CODE, Watchdog

HANGING = """
import sys, time
from pathlib import Path
from cm3jax.reliability.watchdog import Watchdog

def stuck_in_here():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), poll=0.05) as watchdog:
    watchdog.expect("update 7", 0.3)
    stuck_in_here()
"""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_hung_process_writes_its_stacks_and_exits(tmp_path):
    stacks = tmp_path / "stacks.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANGING, stacks], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == EXIT_CODE
    for text in (done.stderr, stacks.read_text()):
        assert "no progress for 0.3 s while doing: update 7" in text
        assert "in stuck_in_here" in text


def test_each_report_gives_new_time(tmp_path):
    clock, exits = Clock(), []
    with Watchdog(tmp_path / "stacks.txt", clock, exits.append, poll=0.005) as watchdog:
        for _ in range(5):
            watchdog.expect("update", 10)
            clock.now += 9
            time.sleep(0.03)
        assert exits == []
        clock.now += 2
        wait_until(lambda: exits == [EXIT_CODE])


def test_nothing_is_expected_before_the_first_report_or_after_the_end(tmp_path):
    clock, exits = Clock(), []
    with Watchdog(tmp_path / "stacks.txt", clock, exits.append, poll=0.005) as watchdog:
        clock.now += 1e6
        time.sleep(0.05)
        watchdog.expect("update", 10)
    clock.now += 1e6
    time.sleep(0.05)
    assert exits == [] and not (tmp_path / "stacks.txt").exists()
