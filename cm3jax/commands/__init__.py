"""The command line of each sub-command; what it does is in the rooms below."""

import argparse
from typing import Any

from absl import flags
from ml_collections import config_flags

from cm3jax.config import ConfigError


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples as written and shows defaults."""


def read_config(arguments: list[str]) -> dict[str, Any]:
    """The nested values of `--config=FILE[:ARG]`, with every `--config.KEY=VALUE` put in.

    Raises:
      ConfigError: no such file or key, a value of the wrong type, or an argument of another name.
    """
    values = flags.FlagValues()
    words = ["cm3", *arguments]
    config_flags.DEFINE_config_file("config", None, "configuration file", flag_values=values, sys_argv=words)
    flags.mark_flags_as_required(["config"], flag_values=values)
    try:
        rest = values(words)
        given = values.config
    except (flags.Error, AttributeError, KeyError, OSError) as error:
        raise ConfigError(f"{' '.join(arguments)}: {error}") from error
    if rest[1:]:
        raise ConfigError(f"unknown arguments {rest[1:]}")
    return given.to_dict()


def config_keys(overrides: list[str]) -> set[str]:
    """The dotted keys of arguments `--config.KEY=VALUE`."""
    return {word.lstrip("-").removeprefix("config.").partition("=")[0] for word in overrides}
