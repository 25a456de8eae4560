"""Dated result files of the benchmarks: what was run, where, and what was found."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FLAGS = Path(__file__).parent.parent / "launch" / "flags"
# What a shell sets for itself.
SHELL = {"_", "SHLVL", "PWD", "OLDPWD"}


def run_under_flags(name: str) -> None:
    """Starts this program anew with the settings of launch/flags/NAME.sh, which the launchers train under too.

    Returns if they are in force. Most are read when a process starts.
    """
    command = ["bash", "-c", 'source "$1" && exec env -0', "bash", str(FLAGS / f"{name}.sh")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    wanted = dict(line.split("=", 1) for line in lines if line)
    if any(os.environ.get(key) != value for key, value in wanted.items() if key not in SHELL):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


def header() -> dict[str, Any]:
    """Date, command, machine and device of this run."""
    import jax  # a process of a benchmark that measures something else does without

    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def write(name: str, title: str, report: dict[str, Any], text: str, folder: Path = RESULTS) -> None:
    """Writes NAME-DATE.json with `report`, which begins with `header()`, and NAME-DATE.md with `text` below it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{report['date']}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    place = f"{report['device']}, {report['machine']}, jax {report['jax']}"
    page = f"# {title}, {report['date']}\n\n`{report['command']}`\n\n{place}\n\n{text}"
    path.with_suffix(".md").write_text(page)
    print(page)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *rows])
