"""The table of docs/aot.md: what `cm3 aot` predicts for CM3Leon's sizes at the paper's batch, on many TPU topologies.

    python benchmarks/aot_table.py --output benchmarks/results/aot            all of it
    python benchmarks/aot_table.py --output DIR --sizes 7b --topologies v5p:8x8x8

Each line is a process of its own, with the compiler flags of launch/flags. A result that is there already is not
compiled again, so that a table that was broken off is gone on with; `table.md` holds all results of the folder.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from cm3jax.perf.topology import parse_topology

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("7b", "760m", "350m")
TOPOLOGIES = ("v5p:8x8x8", "v6e:16x16", "v4:8x8x8", "v5e:16x16", "v5p:16x16x16", "2*v5p:8x8x8", "v4:4x4x4")
HEAD = "| size | topology | mesh | sequences at once, remat | GiB a chip | step, s | MFU | compiled in, s (CPU s) |"
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for size in options.sizes:
        for topology in options.topologies:
            path = _path(options.output, size, topology)
            if not path.exists() and (status := _compile(size, topology, path)):
                failed.append(f"{size} on {topology}: cm3 aot gave no result, status {status}")
            (options.output / "table.md").write_text(_table(options.output))
    print(_table(options.output), end="")
    for problem in failed:
        print(problem, file=sys.stderr)
    return 1 if failed else 0


def _path(folder: Path, size: str, topology: str) -> Path:
    return folder / f"{size}-{topology.replace(':', '-').replace('*', 'x')}.json"


def _compile(size: str, topology: str, path: Path) -> int:
    """Writes the result to `path`; the status of the process where it did not."""
    flags = ROOT / "launch" / "flags" / f"{parse_topology(topology).chip}.sh"
    words = ["-m", "cm3jax.cli", "aot", f"--config=configs/lm/{size}.py", f"--topology={topology}"]
    words += [f"--output={path.resolve()}"]
    command = 'source "$0" && exec "$@"'
    done = subprocess.run(["bash", "-c", command, flags, sys.executable, *words], cwd=ROOT, check=False)
    return 0 if path.exists() else done.returncode


def _table(folder: Path) -> str:
    """Of all results in `folder`, in the order of SIZES and TOPOLOGIES, others last."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found.sort(key=lambda one: (SIZES.index(_size(one)), (*TOPOLOGIES, one["topology"]).index(one["topology"])))
    versions = sorted({f"jax {one['jax']}, libtpu {one['libtpu']}" for one in found})
    dates = sorted({one["date"] for one in found})
    lines = [f"{', '.join(dates)}; {'; '.join(versions)}", "", HEAD, "|" + " --- |" * (HEAD.count("|") - 1)]
    return "\n".join([*lines, *map(_row, found)]) + "\n"


def _size(found: dict) -> str:
    return Path(found["config_file"]).stem


def _row(found: dict) -> str:
    prediction, lm = found["prediction"], found["config"]["lm"]
    mesh = prediction["mesh"]
    groups = prediction["devices"] // mesh["tensor"]
    needed = prediction["needed_bytes"]
    line = prediction["roofline"]
    cells = [
        _size(found),
        found["topology"],
        ", ".join(f"{axis} {count}" for axis, count in mesh.items() if count > 1),
        f"{lm['batch_size'] // lm['accumulate'] // groups}, {lm['model']['remat']}",
        f"{needed / GIB:.1f} of {prediction['hbm_bytes'] / GIB:.0f}" if needed else "too much",
        f"{line['step']:.3f}" if prediction["fits"] else "does not fit",
        f"{line['mfu']:.1%}" if prediction["fits"] else "",
        f"{prediction['seconds']:.0f} ({prediction['cpu_seconds']:.0f})",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
