"""`cm3 aot`: the update of a run compiled for TPUs that are not here: memory, collectives, time and MFU to expect."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress

from cm3jax.commands import HelpFormatter, config_keys, read_config
from cm3jax.config import ConfigError, build, to_dict
from cm3jax.files import write_atomic
from cm3jax.machines import MachineRule, apply_rule, resolve
from cm3jax.parallel.mesh import AXES, axis_sizes, make_mesh
from cm3jax.perf.aot import Prediction, predict
from cm3jax.perf.aot_report import best, prediction_text, prediction_values, sweep_table
from cm3jax.perf.sweep import MICROBATCHES, REMATS, likely_meshes, parse_meshes, sweep
from cm3jax.perf.topology import Topology, described_devices, parse_topology
from cm3jax.train import Config, make_task

EPILOG = """needs libtpu (pip install -e '.[aot]'), but no TPU; --config.KEY=VALUE overrides any value of the file

examples:
  cm3 aot --config=configs/lm/7b.py --topology=v5p:8x8x8
  cm3 aot --config=configs/lm/7b.py --topology='2*v5p:8x8x8' --output=7b.json
  cm3 aot --config=configs/lm/7b.py --topology=v5p:8x8x8 --sweep --meshes='fsdp=-1;data=-1,fsdp=64' --remats=dots,full
  source launch/flags/v5p.sh && cm3 aot ...      with the compiler flags that the launchers set

exit status: 0 it fits, 1 it (or all of a sweep) does not, 2 wrong options
"""


def main(argv: list[str]) -> int:
    """`cm3 aot`; `argv` without the command's own name."""
    options, overrides = _parser().parse_known_args(argv)
    topology = parse_topology(options.topology, options.slices)
    values = read_config([f"--config={options.config}", *overrides])
    # An installed libtpu is asked for topologies; as a platform of its own it would look for TPUs.
    jax.config.update("jax_platforms", "cpu")
    if options.sweep:
        return _sweep(options, values, topology)
    if topology.slices > 1 and "run.mesh.replica" not in config_keys(overrides):
        values["run"]["mesh"]["replica"] = topology.slices
        overrides.append(f"--config.run.mesh.replica={topology.slices}")
    config = build(Config, resolve(values, topology.chip, topology.devices, config_keys(overrides)))
    print(_plan_text(config, topology), flush=True)
    if options.dry_run:
        return 0
    devices = described_devices(topology)
    with _progress() as progress, _compiling(progress, str(topology)):
        found = _predicted(config, devices)
    print(prediction_text(found))
    _save(
        options.output, _head(options, topology) | {"config": to_dict(config), "prediction": prediction_values(found)}
    )
    return 0 if found.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("cm3 aot", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, help="FILE[:ARG] of the run")
    parser.add_argument("--topology", required=True, help="CHIP:SIDESxSIDES, N*CHIP:SIDESxSIDES for N slices")
    parser.add_argument("--slices", type=int, help="how many slices of the topology, joined by the network")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--dry-run", action="store_true", help="show what would be compiled, and compile nothing")
    parser.add_argument("--sweep", action="store_true", help="try layouts, and name the fastest that fits")
    parser.add_argument("--meshes", help="of a sweep: AXIS=SIZE,...;AXIS=SIZE,... (default: a few likely ones)")
    parser.add_argument("--microbatches", default=",".join(map(str, MICROBATCHES)), help="of a sweep, for each device")
    parser.add_argument("--remats", default="none,dots,full", help="of a sweep")
    return parser


def _sweep(options: argparse.Namespace, values: dict[str, Any], topology: Topology) -> int:
    meshes = parse_meshes(options.meshes) if options.meshes else likely_meshes(topology.devices, topology.slices)
    microbatches, remats = _numbers(options.microbatches), _remats(options.remats)
    values.pop("machines", None)
    if options.dry_run:
        for mesh in meshes:
            sizes = dict(zip(AXES, axis_sizes(mesh, topology.devices), strict=True))
            print(f"{topology}: mesh {sizes}, microbatches {microbatches}, remats {remats}")
        return 0
    devices, rows = described_devices(topology), []
    with _progress() as progress:

        def predict_rule(rule: MachineRule) -> Prediction:
            with _compiling(progress, f"{to_dict(rule.mesh)} microbatch={rule.microbatch} remat={rule.remat}"):
                return _predicted(build(Config, apply_rule(values, rule, topology.devices)), devices)

        for name, found in sweep(topology.chip, meshes, microbatches, remats, predict_rule):
            rows.append((name, found))
            progress.console.print(sweep_table([(name, found)]), highlight=False)
    winner = best(rows)
    print(sweep_table(rows))
    print(f"best: {winner[0]}\n{prediction_text(winner[1])}" if winner else "best: none of these fits")
    tried = [
        {"layout": name, "prediction": found if isinstance(found, str) else prediction_values(found)}
        for name, found in rows
    ]
    _save(options.output, _head(options, topology) | {"best": winner[0] if winner else None, "tried": tried})
    return 0 if winner else 1


def _predicted(config: Config, devices: list[jax.Device]) -> Prediction:
    return predict(make_task(config), make_mesh(config.run.mesh, devices))


def _plan_text(config: Config, topology: Topology) -> str:
    sizes = dict(zip(AXES, axis_sizes(config.run.mesh, topology.devices), strict=True))
    task = make_task(config)
    lines = [f"topology          {topology}, {topology.devices} chips, mesh {sizes}"]
    if config.lm is not None:
        lm = config.lm
        lines.append(
            f"batch             {lm.batch_size} sequences of {lm.plan.length} tokens in {lm.accumulate} microbatches, "
            f"remat {lm.model.remat}"
        )
    return "\n".join([*lines, f"FLOPs of an update  model {task.flops_per_batch:.3e}"])


def _numbers(text: str) -> list[int]:
    if not all(word.isdecimal() and int(word) for word in text.split(",")):
        raise ConfigError(f"--microbatches {text!r}: expected numbers above 0, like 1,2,4")
    return [int(word) for word in text.split(",")]


def _remats(text: str) -> list[str]:
    unknown = [word for word in text.split(",") if word not in REMATS]
    if unknown:
        raise ConfigError(f"--remats {text!r}: {unknown[0]!r} is not one of {', '.join(REMATS)}")
    return text.split(",")


def _head(options: argparse.Namespace, topology: Topology) -> dict[str, Any]:
    """What a saved result must say of how it came about."""
    return {
        "date": datetime.date.today().isoformat(),
        "config_file": options.config,
        "topology": str(topology),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "compiler_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }


def _save(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )


@contextlib.contextmanager
def _compiling(progress: rich.progress.Progress, what: str) -> Iterator[None]:
    number = progress.add_task(f"compiling for {what}")
    try:
        yield
    finally:
        progress.remove_task(number)
