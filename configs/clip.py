"""Dual encoders for retrieval.

    cm3 train --config=configs/clip.py:small --workdir=RUN --config.clip.source=coco:captions.json,images,caption=all \
        --config.clip.tokenizer=text.model

Sizes: `vit-b-32` and `vit-l-14` are CLIP's (arXiv 2103.00020, table 20: 32 epochs of 400M pairs, batch 32,768, on 256
V100 GPUs or more) with the merges that OpenAI released as tokenizer; `small` is for two CPU cores, pictures of 64
pixels and the project's own text tokenizer, `small-sigmoid` the same with SigLIP's loss.
"""

import dataclasses

from ml_collections import ConfigDict

from cm3jax.models.clip_config import PRESETS, small

LARGE = {"batch_size": 32_768, "steps": 390_000, "warmup_steps": 2_000, "weight_decay": 0.2, "keep_pictures": False}
SIZES = {
    "vit-b-32": (PRESETS["vit-b-32"], LARGE | {"learning_rate": 5e-4}),
    "vit-l-14": (PRESETS["vit-l-14"], LARGE | {"learning_rate": 4e-4}),
    "small": (
        small(image_size=64, vocab_size=512, end_id=2, context=40),
        {
            "batch_size": 64,
            "steps": 1_500,
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "keep_pictures": True,
            "learning_rate": 1e-3,
        },
    ),
}
SIZES["small-sigmoid"] = (dataclasses.replace(SIZES["small"][0], bias=True), SIZES["small"][1])


def get_config(size: str = "small") -> ConfigDict:
    model, values = SIZES[size]
    dtype = "float32" if size.startswith("small") else "bfloat16"
    return ConfigDict(
        {
            "task": "clip",
            "run": {
                "steps": values["steps"],
                "log_every": 10,
                "checkpoint": {"every": max(1, values["steps"] // 100), "keep": 2},
            },
            "clip": {
                "model": dataclasses.asdict(dataclasses.replace(model, dtype=dtype)),
                "tokenizer": "bpe_simple_vocab_16e6.txt.gz" if size.startswith("vit") else "text.model",
                "source": "scenes",
                "batch_size": values["batch_size"],
                "keep_pictures": values["keep_pictures"],
                "optim": {
                    "learning_rate": values["learning_rate"],
                    "warmup_steps": values["warmup_steps"],
                    "weight_decay": values["weight_decay"],
                    "decay": "cosine",
                    "final_ratio": 0.0,
                    "b2": 0.98,
                    "eps": 1e-6,
                },
            },
        }
    )
