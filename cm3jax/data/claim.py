"""The directory of a job that is killed and run again: it belongs to the settings that it was begun with."""

import json
import pathlib
from typing import Any

from cm3jax.files import write_atomic

SETTINGS = "settings.json"


def claim(out: pathlib.Path, settings: dict[str, Any], error: type[ValueError]) -> None:
    """Makes `out` the directory of these settings (JSON values), or finds that it is.

    Raises:
      error: the directory holds something else, or was begun with other settings; the message names them.
    """
    path = out / SETTINGS
    if not path.is_file():
        if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise error(f"{out} is not empty and has no {SETTINGS}: not a directory of this job")
        write_atomic(path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    try:
        begun = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as cause:
        raise error(f"damaged settings {path}: {cause}") from cause
    changes = [f"{key} {begun.get(key)!r}, now {value!r}" for key, value in settings.items() if begun.get(key) != value]
    if changes:
        raise error(f"{path}: the directory was begun with other settings: {'; '.join(changes)}")
