"""The `cm3` command: sub-commands, each one call into a room below."""

import importlib
import logging
import sys

COMMANDS = {
    "quickstart": ("cm3jax.commands.quickstart", "the whole path on the embedded data set, ending in report.html"),
    "preflight": ("cm3jax.commands.preflight", "check machines, devices and links before a run"),
    "aot": ("cm3jax.commands.aot", "compile a run for TPUs that are not here, and say what to expect"),
    "train": ("cm3jax.commands.train", "train a task from a config file"),
    "data": ("cm3jax.commands.data", "prepare data: scenes, ingest, train-text, tokenize, show"),
    "retrieval": ("cm3jax.commands.retrieval", "embed documents and find their neighbours: embed, neighbours, show"),
    "generate": ("cm3jax.commands.generate", "generate images from text, or text from images"),
}


def usage() -> str:
    lines = [f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: cm3 COMMAND [options]", "", *lines, "", "cm3 COMMAND --help shows a command's options"])


def main(argv: list[str] | None = None) -> int:
    """Runs one sub-command; an expected error is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"cm3: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    line = "%(asctime)s %(levelname).1s %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, datefmt="%H:%M:%S", force=True)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    command = importlib.import_module(COMMANDS[argv[0]][0])
    try:
        return command.main(argv[1:])
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        print(f"cm3 {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
