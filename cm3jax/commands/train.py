"""`cm3 train`: one configuration file, overrides, a run directory; no other flag."""

import argparse
import logging
from pathlib import Path

import jax

from cm3jax.commands import HelpFormatter, read_config
from cm3jax.config import build
from cm3jax.train import Config, train

logger = logging.getLogger(__name__)

EPILOG = """any value of the file is overridden with --config.KEY=VALUE; the same command again resumes

example:
  cm3 train --config=configs/lm/cm3leon.py:350m --workdir=runs/lm --config.lm.optim.learning_rate=3e-4
"""


def main(argv: list[str]) -> int:
    """`cm3 train`; `argv` without the command's own name."""
    parser = argparse.ArgumentParser("cm3 train", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, help="FILE[:ARG]: a Python file with get_config(arg)")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, metrics and the resolved config")
    options, overrides = parser.parse_known_args(argv)
    config = build(Config, read_config([f"--config={options.config}", *overrides]))
    logger.info("devices: %s", jax.devices())
    train(config, options.workdir)
    return 0
