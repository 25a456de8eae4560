"""`cm3 quickstart`: the whole path in one command."""

import argparse
import logging
from pathlib import Path

from cm3jax.commands import HelpFormatter, read_config
from cm3jax.config import build
from cm3jax.quickstart import EMBEDDED, QuickstartConfig, quickstart

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"
EPILOG = """examples:
  cm3 quickstart --workdir runs/quickstart
  cm3 quickstart --workdir runs/photos --source coco:captions.json,images --config configs/quickstart.py:tiny

The same command again skips what is done; --config.KEY=VALUE overrides a size. The report is WORKDIR/report.html.
"""


def main(argv: list[str]) -> int:
    """`cm3 quickstart`; `argv` without the command's own name."""
    parser = argparse.ArgumentParser(
        "cm3 quickstart", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    parser.add_argument("--source", default=EMBEDDED, help="pictures with captions: see `cm3 data tokenize --help`")
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="FILE[:SIZE], sizes of every stage")
    options, overrides = parser.parse_known_args(argv)
    values = read_config([f"--config={options.config}", *overrides])
    report = quickstart(build(QuickstartConfig, values), options.source, options.workdir)
    logger.info("report: %s", report)
    return 0
