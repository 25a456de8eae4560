"""`cm3 preflight`: what can be known in a minute about the machines of a run, before it is started on them."""

import argparse
import os
from pathlib import Path

import jax

from cm3jax.commands import HelpFormatter, config_keys, read_config
from cm3jax.config import build
from cm3jax.machines import resolve
from cm3jax.parallel.departure import joined
from cm3jax.parallel.distributed import from_environment
from cm3jax.parallel.mesh import MeshConfig
from cm3jax.perf.findings import failed, table
from cm3jax.perf.preflight import Limits, preflight
from cm3jax.train import Config

EPILOG = """with the options of `cm3 train` it checks the mesh of that run; without --config, one axis over all devices

examples:
  cm3 preflight --workdir=runs/lm
  launch/local.sh --processes 4 -- cm3 preflight --config=configs/lm/350m.py --workdir=runs/lm

exit status: 0 all is well, 1 a check failed, 2 wrong options, 86 a check hung, 87 another process is gone
"""


def main(argv: list[str]) -> int:
    """`cm3 preflight`; `argv` without the command's own name."""
    parser = argparse.ArgumentParser("cm3 preflight", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="the run directory, tried by writing to it")
    parser.add_argument("--config", help="FILE[:ARG] of the run; its mesh is checked")
    limits = Limits()
    parser.add_argument("--seconds", type=float, default=limits.seconds, help="for one check")
    parser.add_argument("--clock-seconds", type=float, default=limits.clock_seconds, help="between two clocks")
    parser.add_argument("--free-gb", type=float, default=limits.free_bytes / 1e9, help="room in the run directory")
    parser.add_argument("--slow-share", type=float, default=limits.slow_share, help="of the median matrix product rate")
    parser.add_argument("--link-share", type=float, default=limits.link_share, help="of the rate of a device's links")
    options, overrides = parser.parse_known_args(argv)
    if overrides and not options.config:
        parser.error(f"unknown arguments {overrides}")
    values = read_config([f"--config={options.config}", *overrides]) if options.config else None
    limits = Limits(
        seconds=options.seconds,
        clock_seconds=options.clock_seconds,
        free_bytes=options.free_gb * 1e9,
        slow_share=options.slow_share,
        link_share=options.link_share,
    )
    with joined(from_environment(os.environ)):
        mesh = MeshConfig()
        if values is not None:
            devices = jax.devices()
            values = resolve(values, devices[0].device_kind, len(devices), config_keys(overrides))
            mesh = build(Config, values).run.mesh
        findings = preflight(options.workdir, mesh, limits)
    bad = failed(findings)
    if jax.process_index() == 0:
        print(table(findings))
        print(f"preflight: FAILED: {', '.join(bad)}" if bad else "preflight: all is well", flush=True)
    return 1 if bad else 0
