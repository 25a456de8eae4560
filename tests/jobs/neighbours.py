"""Embeds the records of scenes with a small encoder and finds their neighbours; for tests that kill it.

python neighbours.py RECORDS TOKENIZER OUT

Started by a launcher (CM3_PROCESSES, CM3_PROCESS, CM3_COORDINATOR), it is one of several processes that share the work.
"""

import os
import sys
from pathlib import Path

import jax
from flax import nnx

from cm3jax.data.records import Records
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.models.clip import CLIP
from cm3jax.models.clip_config import CLIPConfig, TowerConfig
from cm3jax.parallel.departure import joined
from cm3jax.parallel.distributed import from_environment
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.retrieval.backends import BackendConfig
from cm3jax.retrieval.embed import embed
from cm3jax.retrieval.embeddings import Embeddings
from cm3jax.retrieval.encoder import DocumentEncoder
from cm3jax.retrieval.find_neighbours import find_neighbours
from cm3jax.retrieval.select import SelectionConfig
from cm3jax.tokens.captions import load_caption_tokenizer

DOCUMENTS = 48
MODEL = CLIPConfig(
    16, TowerConfig(32, 1, 2), TowerConfig(32, 1, 2), image_size=32, patch_size=8, vocab_size=320, context=24, end_id=2
)
# An encoder that learnt nothing finds everything alike.
RULES = SelectionConfig(max_score=0.99999, max_similarity=0.99999, searched=16)


def small_encoder(tokenizer: Path, batch_size: int = 8) -> DocumentEncoder:
    """Random weights, the same at every call."""
    params = nnx.to_pure_dict(nnx.state(CLIP(MODEL, nnx.Rngs(0))))
    tokenizer_ = load_caption_tokenizer(tokenizer, MODEL.context)
    return DocumentEncoder(MODEL, params, tokenizer_, _own_mesh(), batch_size)


def embed_scenes(records: Path, tokenizer: Path, out: Path, process: int = 0, processes: int = 1) -> None:
    """The embedding job, as one process of several."""
    source = ScenesSource("train", DOCUMENTS, 32)
    share = {"process": process, "processes": processes}
    embed(Records(records), source, small_encoder(tokenizer), out / "embeddings", query_dropout=0.2, **share)


def find_scenes(out: Path, process: int = 0, processes: int = 1) -> None:
    """The neighbour job, as one process of several; the embeddings must be finished."""
    memory = Embeddings(out / "embeddings")
    share = {"process": process, "processes": processes}
    find_neighbours(memory, [memory], out / "neighbours", RULES, BackendConfig(), _own_mesh(), **share)


def run(records: Path, tokenizer: Path, out: Path, process: int = 0, processes: int = 1) -> None:
    """Both jobs, as one process of several."""
    embed_scenes(records, tokenizer, out, process, processes)
    find_scenes(out, process, processes)


def _own_mesh() -> jax.sharding.Mesh:
    """One device of this process."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


if __name__ == "__main__":
    with joined(from_environment(os.environ)):
        run(*map(Path, sys.argv[1:4]), jax.process_index(), jax.process_count())
