"""`cm3 train`: one configuration file, overrides, a run directory; no other flag."""

import argparse
import dataclasses
import logging
import os
from pathlib import Path

import jax

from cm3jax.commands import HelpFormatter, config_keys, read_config
from cm3jax.config import build
from cm3jax.machines import resolve
from cm3jax.parallel.departure import joined
from cm3jax.parallel.distributed import from_environment
from cm3jax.train import Config, train

logger = logging.getLogger(__name__)

PROFILED_UPDATES = 5

EPILOG = """any value of the file is overridden with --config.KEY=VALUE; the same command again resumes

example:
  cm3 train --config=configs/lm/350m.py --workdir=runs/lm --config.lm.optim.learning_rate=3e-4

exit status: 0 finished, or saved and left because a signal asked (CM3_EXIT_STOPPED names another status for that);
86 hung; 87 another process is gone

several processes: see launch/, whose scripts set CM3_PROCESSES, CM3_PROCESS and CM3_COORDINATOR, or CM3_CLUSTER=1
"""


def main(argv: list[str]) -> int:
    """`cm3 train`; `argv` without the command's own name."""
    parser = argparse.ArgumentParser("cm3 train", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, help="FILE[:ARG]: a Python file with get_config(arg)")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, metrics and the resolved config")
    parser.add_argument("--profile", action="store_true", help=f"trace {PROFILED_UPDATES} updates into the run")
    options, overrides = parser.parse_known_args(argv)
    values = read_config([f"--config={options.config}", *overrides])
    with joined(from_environment(os.environ)):
        devices = jax.devices()
        logger.info("%d devices: %s", len(devices), devices[0].device_kind)
        config = build(Config, resolve(values, devices[0].device_kind, len(devices), config_keys(overrides)))
        if options.profile:
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, profile_updates=PROFILED_UPDATES))
        state = train(config, options.workdir)
    return 0 if int(state.step) >= config.run.steps else int(os.environ.get("CM3_EXIT_STOPPED", "0"))
