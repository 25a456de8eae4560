"""What memory in pages of 2 MB (launch/flags/cpu.sh) is worth to training on CPUs.

    JAX_PLATFORMS=cpu python benchmarks/large_pages.py --quickstart runs/quickstart [--updates 120]

The decoder and the image tokenizer of a finished quickstart are trained anew for a few updates, each time in a process
of its own, with the system's pages and with large ones in the order ABBA. A rate is the median of what the run logs
after its first fifth.

Writes benchmarks/results/large_pages-DATE.json and .md.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import RESULTS, header, table, write

from cm3jax.config import build
from cm3jax.metrics import read_metrics
from cm3jax.reliability.checkpoint import read_run_config
from cm3jax.train import Config, train

PAGES = {"system": "", "large": "glibc.malloc.hugetlb=1"}
STAGES = {"decoder": "tokens_per_second", "image_tokenizer": "images_per_second"}


def train_once(run: Path, updates: int, workdir: Path) -> None:
    """What `run` was, for `updates` updates, in `workdir`."""
    config = build(Config, read_run_config(run))
    loop = dataclasses.replace(config.run, steps=updates, log_every=max(1, updates // 10))
    train(dataclasses.replace(config, run=loop), workdir)


def rate(stage: str, pages: str, options: argparse.Namespace) -> float:
    """Units a second of one training in a new process."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, __file__, "--quickstart", str(options.quickstart)]
        command += ["--updates", str(options.updates), "--train", stage, "--workdir", workdir]
        subprocess.run(command, env=os.environ | {"GLIBC_TUNABLES": PAGES[pages]}, check=True)
        steps, values = read_metrics(Path(workdir) / "metrics.jsonl")[STAGES[stage]]
    return statistics.median(v for step, v in zip(steps, values, strict=True) if step > options.updates / 5)


def compare(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of both kinds of pages in turn."""
    rates: dict[str, list[float]] = {pages: [] for pages in PAGES}
    for pages in (*PAGES, *reversed(PAGES)):
        rates[pages].append(rate(stage, pages, options))
    ratio = statistics.fmean(rates["large"]) / statistics.fmean(rates["system"])
    return {"stage": stage, "unit": STAGES[stage], "rates": rates, "ratio": ratio}


def row(found: dict[str, Any]) -> list[str]:
    rates = (" and ".join(f"{value:.0f}" for value in values) for values in found["rates"].values())
    return [f"{found['stage']}, {found['unit'].replace('_', ' ')}", *rates, f"{found['ratio']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--train", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_once(options.quickstart / options.train, options.updates, options.workdir)
        return
    found = [compare(stage, options) for stage in STAGES]
    setting = f"{options.updates} updates, two processes of each kind, in turns.\n\n"
    text = setting + table(["training", "system's pages", "pages of 2 MB", "ratio"], [row(one) for one in found])
    write("large_pages", "Large pages", header() | {"updates": options.updates, "found": found}, text, options.out)


if __name__ == "__main__":
    main()
