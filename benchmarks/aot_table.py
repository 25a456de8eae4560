"""The table of docs/aot.md: what `cm3 aot` predicts for CM3Leon's sizes at the paper's batch, on many TPU topologies.

    python benchmarks/aot_table.py --output benchmarks/results/aot            all of it
    python benchmarks/aot_table.py --output DIR --sizes 7b --topologies v5p:8x8x8

Each line is a process of its own, with the compiler flags of launch/flags; results that are there already are kept.
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
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in options.sizes:
        for topology in options.topologies:
            found = _result(options.output, size, topology)
            rows.append(_row(size, topology, found))
            print(rows[-1], flush=True)
    head = "| size | topology | mesh | sequences at once, remat | GiB a chip | step, s | MFU | compiled in, s (CPU s) |"
    table = "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *rows])
    (options.output / "table.md").write_text(table + "\n")
    print(table)


def _result(folder: Path, size: str, topology: str) -> dict:
    path = folder / f"{size}-{topology.replace(':', '-').replace('*', 'x')}.json"
    if not path.exists():
        flags = ROOT / "launch" / "flags" / f"{parse_topology(topology).chip}.sh"
        command = 'source "$0" && exec "$@"'
        words = ["-m", "cm3jax.cli", "aot", f"--config={ROOT}/configs/lm/{size}.py"]
        words += [f"--topology={topology}", f"--output={path}"]
        done = subprocess.run(["bash", "-c", command, flags, sys.executable, *words], cwd=ROOT, check=False)
        if not path.exists():
            raise SystemExit(f"{size} on {topology}: cm3 aot failed with status {done.returncode}")
    return json.loads(path.read_text())


def _row(size: str, topology: str, found: dict) -> str:
    prediction, lm = found["prediction"], found["config"]["lm"]
    mesh = prediction["mesh"]
    groups = prediction["devices"] // mesh["tensor"]
    needed = prediction["needed_bytes"]
    line = prediction["roofline"]
    cells = [
        size,
        topology,
        ", ".join(f"{axis} {count}" for axis, count in mesh.items() if count > 1),
        f"{lm['batch_size'] // lm['accumulate'] // groups}, {lm['model']['remat']}",
        f"{needed / GIB:.1f} of {prediction['hbm_bytes'] / GIB:.0f}" if needed else "too much",
        f"{line['step']:.3f}" if prediction["fits"] else "does not fit",
        f"{line['mfu']:.1%}" if prediction["fits"] else "",
        f"{prediction['seconds']:.0f} ({prediction['cpu_seconds']:.0f})",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
