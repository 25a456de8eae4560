"""What the jobs share that write a directory of shards: whose directory it is, reading ahead, a progress bar."""

import collections
import concurrent.futures
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import rich.console
import rich.progress

from cm3jax.files import write_atomic

SETTINGS = "settings.json"
REJECTS = "rejects.jsonl"

Item = TypeVar("Item")
Result = TypeVar("Result")


def claim(out: pathlib.Path, settings: Mapping[str, Any], error: type[ValueError]) -> None:
    """Makes `out` the directory of these settings (JSON values), or finds that it is.

    Raises:
      error: the directory was begun with other settings, or is not one of this kind of job.
    """
    path = out / SETTINGS
    if not path.is_file():
        if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise error(f"{out} is not empty and has no {SETTINGS}: not a directory of this job")
        write_atomic(path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    try:
        begun = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as damage:
        raise error(f"damaged settings {path}: {damage}") from damage
    changes = [f"{key} {begun.get(key)!r}, now {value!r}" for key, value in settings.items() if begun.get(key) != value]
    if changes:
        raise error(f"{path}: the directory was begun with other settings: {'; '.join(changes)}")


def progress_bar() -> rich.progress.Progress:
    """A bar on stderr with a count, to be used in `with`."""
    return rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=rich.console.Console(stderr=True),
    )


def ahead(
    pool: concurrent.futures.Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """`map(function, items)` in order, with `depth` calls under way, so that memory stays bounded."""
    futures: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) >= depth:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
