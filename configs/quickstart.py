"""The whole path at a small size.

    cm3 quickstart --config configs/quickstart.py:laptop

Sizes: `laptop` (two CPU cores, below twenty minutes) and `tiny` (a minute; shows that everything runs, learns little).
`retrieved` 0 trains a decoder on documents that stand alone, without encoder and memory.
"""

import copy
import dataclasses

from ml_collections import ConfigDict

from cm3jax.data.scenes.space import ATTRIBUTES
from cm3jax.models import vqgan
from cm3jax.models.clip_config import small
from cm3jax.models.config import chameleon
from cm3jax.tokens.vocabulary import Vocabulary

SENTINELS = 16

SIZES = {
    "laptop": {
        "train_documents": 12_000,
        "valid_documents": 512,
        "text_documents": 2_000,
        "text_size": 512,
        "vqgan": {
            "preset": "scenes",
            "resolution": 64,
            "steps": 1_000,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "disc_start": None,
        },
        "encoder": {"width": 128, "layers": 2, "steps": 400, "batch_size": 64},
        # The paper's 0.9 is for photographs. Scenes have no near-duplicates: what an encoder this small scores above
        # 0.9 has the place, the sky and the color of the query, and another layout. Only copies are refused
        # (docs/retrieval.md has the figures).
        "selection": {"max_score": 1.0, "max_similarity": 0.999},
        "retrieved": 1,
        "lm": {
            "d_model": 160,
            "n_layers": 4,
            "n_heads": 5,
            "d_ff": 432,
            "document_tokens": 96,
            "steps": 2_000,
            "batch_size": 8,
            "learning_rate": 3e-3,
        },
        "reader": {"steps": 800, "channels": 64},
        "study": {"documents": 128, "shown": 16},
    },
    "tiny": {
        "train_documents": 64,
        "valid_documents": 16,
        "text_documents": 64,
        "text_size": 512,
        "vqgan": {
            "preset": "tiny",
            "resolution": 32,
            "steps": 6,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "disc_start": 3,
        },
        "encoder": {"width": 32, "layers": 1, "steps": 6, "batch_size": 16},
        # An encoder of six updates finds all documents alike; none is refused for that.
        "selection": {"max_score": 2.0, "max_similarity": 2.0},
        "retrieved": 1,
        "lm": {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 2,
            "d_ff": 96,
            "document_tokens": 160,
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 2e-3,
        },
        "reader": {"steps": 6, "channels": 8},
        "study": {"documents": 4, "shown": 4},
    },
}


def get_config(size: str = "laptop") -> ConfigDict:
    sizes = copy.deepcopy(SIZES[size])
    image = dataclasses.replace(
        vqgan.PRESETS[sizes["vqgan"].pop("preset")], resolution=sizes["vqgan"].pop("resolution")
    )
    used = sizes["text_size"] + image.codes + 2 + SENTINELS
    vocabulary = {
        "text_size": sizes["text_size"],
        "image_size": image.codes,
        "sentinels": SENTINELS,
        "size": -(-used // 64) * 64,
    }
    return ConfigDict(
        {
            "train_documents": sizes["train_documents"],
            "valid_documents": sizes["valid_documents"],
            "text_documents": sizes["text_documents"],
            "vocabulary": vocabulary,
            "vqgan": vqgan_run(image, **sizes["vqgan"]),
            "encoder": encoder_run(image.resolution, sizes["text_size"], **sizes["encoder"]),
            "selection": sizes["selection"],
            "lm": lm_run(vocabulary, sizes["retrieved"], valid_documents=sizes["valid_documents"], **sizes["lm"]),
            "reader": reader_run(image.resolution, **sizes["reader"]),
            "study": {
                **sizes["study"],
                "guidance": 2.0,
                "image": {"temperature": 1.0, "top_p": 0.9},
                "text": {"temperature": 0.0},
            },
        }
    )


def run(steps: int) -> dict:
    return {"steps": steps, "log_every": max(1, steps // 100), "checkpoint": {"every": max(1, steps // 3), "keep": 2}}


def vqgan_run(image, steps: int, batch_size: int, learning_rate: float, disc_start: int | None) -> dict:
    # An adversary costs more than the tokenizer at this size, and needs more updates than a laptop has to be of use.
    adversary = {"discriminator": None}
    if disc_start is not None:
        adversary = {"disc_start": disc_start, "disc_weight": 0.1, "discriminator": {"channels": 16, "layers": 2}}
    return {
        "task": "vqgan",
        "run": run(steps),
        "vqgan": {
            "model": dataclasses.asdict(image),
            "data": {"source": "scenes", "flip": False, "crop": "center"},
            "loss": adversary,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "disc_learning_rate": learning_rate,
            "warmup_steps": steps // 20,
            "decay": "cosine",
            "ema_decay": 0.99,
            "revive_after": 50,
            "valid_images": 256,
        },
    }


def encoder_run(resolution: int, text_size: int, width: int, layers: int, steps: int, batch_size: int) -> dict:
    model = small(resolution, text_size, Vocabulary().eos, context=40, width=width, layers=layers)
    return {
        "task": "clip",
        "run": run(steps),
        "clip": {
            "model": dataclasses.asdict(model),
            "tokenizer": "text.model",
            "source": "scenes",
            "batch_size": batch_size,
            "valid_pairs": 256,
            "optim": {
                "learning_rate": 1e-3,
                "warmup_steps": steps // 10,
                "weight_decay": 0.1,
                "decay": "cosine",
                "final_ratio": 0.0,
                "b2": 0.98,
                "eps": 1e-6,
            },
        },
    }


def lm_run(
    vocabulary: dict[str, int],
    retrieved: int,
    valid_documents: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    document_tokens: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> dict:
    documents = 1 + retrieved
    length = documents * document_tokens
    # With query-key norm and rotary positions a small decoder learns in half the updates (docs/model.md).
    model = dataclasses.replace(
        chameleon(d_model, n_layers, n_heads, n_heads, d_ff, vocabulary["size"], length),
        tie_embeddings=True,
        zero_init_residual=True,
    )
    return {
        "task": "lm",
        "run": run(steps),
        "lm": {
            "model": dataclasses.asdict(model),
            "train": ({"path": "records/train"},),
            "valid": ({"path": "records/valid"},),
            "vocabulary": vocabulary,
            "image_tokenizer": "image_tokenizer",
            "text_tokenizer": "text.model",
            # One sample a sequence, and in most documents the caption or the picture masked whole: what a caption says
            # of its picture is then learnt soonest.
            "plan": {"length": length, "packing": "whole", "span_rate": 1.25 * documents, "max_spans": documents},
            "cm3": {"whole_segment": 1.0},
            "retrieved": retrieved,
            "batch_size": batch_size,
            "valid_batches": valid_documents // batch_size,
            "loss_chunk": 4096,
            "optim": {"learning_rate": learning_rate, "warmup_steps": steps // 20, "b2": 0.98},
        },
    }


def reader_run(image_size: int, steps: int, channels: int) -> dict:
    return {
        "task": "reader",
        "run": run(steps),
        "reader": {
            "model": {"attributes": tuple(ATTRIBUTES.items()), "image_size": image_size, "channels": channels},
            "source": "scenes",
            "valid": "scenes",
            "batch_size": 32 if image_size > 32 else 16,
        },
    }
