"""Checks of the machines that processes run on: the same software, clocks that agree, a work directory that works."""

import importlib
import os
import platform
import secrets
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from cm3jax.files import write_atomic
from cm3jax.perf.findings import Finding, everyones, named

PACKAGES = ("jax", "jaxlib", "flax", "cm3jax")
CLOCK_ROUNDS = 3
WRITTEN_BYTES = 16 * 2**20


def check_versions(hosts: list[str], seconds: float) -> Finding:
    """Python and the packages that decide what is computed must be the same everywhere."""
    own = {"python": platform.python_version()} | {name: importlib.import_module(name).__version__ for name in PACKAGES}
    return judge_versions(everyones(own, "versions", seconds), hosts)


def judge_versions(versions: list[dict[str, str]], hosts: list[str]) -> Finding:
    """The versions that most processes have are taken for the right ones."""
    common = dict(Counter(tuple(sorted(own.items())) for own in versions).most_common(1)[0][0])
    others = {
        i: ", ".join(f"{name} {version}" for name, version in own.items() if common.get(name) != version)
        for i, own in enumerate(versions)
        if own != common
    }
    text = ", ".join(f"{name} {common[name]}" for name in ("python", *PACKAGES) if name in common)
    if others:
        return Finding("versions", False, named(others, hosts), f"as the others: {text}")
    return Finding("versions", True, text, "the same in all processes")


def check_clocks(hosts: list[str], seconds: float, limit: float) -> Finding:
    """Clocks read right after a meeting point: they differ by no more than `limit` seconds."""
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        everyones(None, "clocks", seconds)
        rounds.append(everyones(time.time(), "clocks", seconds))
    return judge_clocks(rounds, hosts, limit)


def judge_clocks(rounds: list[list[float]], hosts: list[str], limit: float) -> Finding:
    """A process may leave a meeting point late, so of its differences to the first process the smallest counts."""
    differences = [min((r[i] - r[0] for r in rounds), key=abs) for i in range(len(rounds[0]))]
    far = {i: f"{value:+.3f} s" for i, value in enumerate(differences) if abs(value) > limit}
    expected = f"at most {limit:g} s from process 0"
    if far:
        return Finding("clocks", False, named(far, hosts), expected)
    return Finding("clocks", True, f"at most {max(map(abs, differences)):.3f} s apart", expected)


def check_storage(workdir: Path, hosts: list[str], seconds: float, free_bytes: float) -> list[Finding]:
    """Room in `workdir`; files written, renamed and read there; and whether all processes see the same directory."""
    folder = workdir / ".preflight"
    written = _write(folder / str(jax.process_index()))
    written_by_all = everyones(written, "files in the work directory", seconds)
    seen = {str(i): _read(folder / str(i), written_by_all[i]) for i in _to_read(len(hosts))}
    seen_by_all = everyones(seen, "files of other processes", seconds)
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return judge_storage(written_by_all, seen_by_all, hosts, free_bytes)


def _to_read(processes: int) -> set[int]:
    """The first process and the next one: all that is needed to see that a directory is not shared."""
    return {0, (jax.process_index() + 1) % processes}


def _write(folder: Path) -> dict[str, Any]:
    """What this process can do: the steps of a checkpoint, which is a folder that gets its name at the end."""
    token = secrets.token_hex(8)
    started = time.perf_counter()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        write_atomic(temporary / "data", os.urandom(WRITTEN_BYTES))
        write_atomic(temporary / "note", token.encode())
        temporary.rename(folder)
        rate = WRITTEN_BYTES / (time.perf_counter() - started)
        if (folder / "note").read_text() != token:
            return {"error": f"{folder}: what was read is not what was written"}
        return {"token": token, "rate": rate, "free": shutil.disk_usage(folder).free}
    except OSError as error:
        return {"error": str(error)}


def _read(folder: Path, written: dict[str, Any]) -> bool:
    try:
        return "token" not in written or (folder / "note").read_text() == written["token"]
    except OSError:
        return False


def judge_storage(
    written: list[dict[str, Any]], seen: list[dict[str, bool]], hosts: list[str], free_bytes: float
) -> list[Finding]:
    """Three findings: written by all, seen by all, room for all."""
    errors = {i: own["error"] for i, own in enumerate(written) if "error" in own}
    expected = "written, renamed and read by all"
    if errors:
        return [Finding("work directory", False, named(errors, hosts), expected)]
    rates = [own["rate"] for own in written]
    blind = {
        i: "does not see the files of " + ", ".join(f"process {other}" for other, ok in found.items() if not ok)
        for i, found in enumerate(seen)
        if not all(found.values())
    }
    room = {i: f"{own['free'] / 1e9:.1f} GB" for i, own in enumerate(written) if own["free"] < free_bytes}
    return [
        Finding("work directory", True, f"{min(rates) / 1e6:.0f} MB/s written by each process or more", expected),
        Finding(
            "shared", not blind, named(blind, hosts) or "files of other processes are seen", "one for all processes"
        ),
        Finding(
            "free disk",
            not room,
            named(room, hosts) or f"{min(own['free'] for own in written) / 1e9:.1f} GB",
            f"at least {free_bytes / 1e9:g} GB",
        ),
    ]
