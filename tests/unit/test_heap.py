import platform
from pathlib import Path

import pytest

from cm3jax.reliability.heap import return_freed_memory


def resident_mb():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def test_freed_memory_leaves_the_process():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("NOT GNU's C LIBRARY: nothing is handed back, so this test checked nothing")
    # Small blocks live in the heap; one that stays, the last, pins what lies below it.
    blocks = [bytes(2000) for _ in range(100_000)]
    last = blocks[-1]
    del blocks
    before = resident_mb()
    return_freed_memory()
    assert resident_mb() < before - 100
    assert len(last) == 2000
