"""The command line of each sub-command; what it does is in the rooms below."""

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples as written and shows defaults."""
