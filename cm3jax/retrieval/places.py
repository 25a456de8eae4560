"""Where the records and the encoder of embeddings are, so that a memory is opened by one name.

`cm3 retrieval embed` writes `places.json` into the folder of embeddings. It is a hint and no part of their fingerprint:
files may be moved, and what is found there now is compared with the fingerprints of the manifest.
"""

import dataclasses
import json
import os
import pathlib

from cm3jax import config
from cm3jax.files import write_atomic
from cm3jax.retrieval.embeddings import RetrievalError

PLACES = "places.json"


@dataclasses.dataclass(frozen=True)
class Places:
    """Attributes:
    records: folder of records.
    encoder: a `clip` run, or a file of CLIP's weights.
    size, tokenizer: of a file, as for `encoder.load_encoder`.
    """

    records: str
    encoder: str
    size: str | None = None
    tokenizer: str | None = None


def write_places(embeddings: pathlib.Path, places: Places) -> None:
    """Writes them relative to the folder of embeddings, so that all may be moved together."""
    values = {
        name: value if name == "size" or value is None else os.path.relpath(value, embeddings)
        for name, value in dataclasses.asdict(places).items()
    }
    write_atomic(embeddings / PLACES, (json.dumps(values, indent=2) + "\n").encode())


def read_places(embeddings: pathlib.Path) -> Places:
    """Paths as they are seen from here.

    Raises:
      RetrievalError: there is no such file, or it is damaged.
    """
    path = embeddings / PLACES
    try:
        places = config.build(Places, json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise RetrievalError(f"no {path}: name the records and the encoder of these embeddings") from None
    except (ValueError, AttributeError) as error:
        raise RetrievalError(f"damaged {path}: {error}") from error
    return dataclasses.replace(
        places,
        records=str(embeddings / places.records),
        encoder=str(embeddings / places.encoder),
        tokenizer=None if places.tokenizer is None else str(embeddings / places.tokenizer),
    )
