"""`cm3 train`: one configuration file, overrides, a run directory; no other flag."""

import logging
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from cm3jax.config import ConfigError, build
from cm3jax.train import Config, train

logger = logging.getLogger(__name__)

HELP = """Train a task: decoder (lm), image tokenizer (vqgan), or attribute reader.

  cm3 train --config=configs/lm/scenes.py --workdir=runs/lm --config.lm.optim.learning_rate=3e-4

--config=FILE[:ARG]    a Python file with get_config(arg); any value is overridden with --config.KEY=VALUE
--workdir=DIR          checkpoints, metrics and the resolved config; the same command again resumes
"""


def main(argv: list[str]) -> int:
    """`cm3 train`; `argv` without the command's own name."""
    if not argv or {"--help", "-h"} & set(argv):
        print(HELP)
        return 0
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configuration file", flag_values=values)
    flags.DEFINE_string("workdir", None, "run directory", flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)
    try:
        rest = values(["cm3 train", *argv])
    except (flags.Error, AttributeError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    if rest[1:]:
        raise ConfigError(f"cm3 train takes no arguments, found {rest[1:]}")
    config = build(Config, values.config.to_dict())
    logger.info("devices: %s", jax.devices())
    train(config, Path(values.workdir))
    return 0
