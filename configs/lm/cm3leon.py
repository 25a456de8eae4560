"""CM3Leon decoders at the paper's sizes (arXiv 2309.02591, table 3).

    cm3 train --config=configs/lm/cm3leon.py:350m --workdir=RUN --config.lm.train="[...]"

Sizes: 350m, 760m, 7b. Batch 8M tokens (2048 sequences of 4096), 1500 warm-up updates, peak rate as in the table.
Hardware of the paper: 256 (350m, 760m) or 512 (7b) GPUs. Betas, decay, schedule are unstated there; these are OPT's.
Paths of the records and tokenizers are given on the command line or in a copy of this file.
"""

import dataclasses

from ml_collections import ConfigDict

from cm3jax.models.config import PRESETS

SIZES = {
    "350m": {"learning_rate": 6e-4, "steps": 175_000},
    "760m": {"learning_rate": 5e-4, "steps": 237_500},
    "7b": {"learning_rate": 1.2e-4, "steps": 300_000},
}


def get_config(size: str = "350m") -> ConfigDict:
    values = SIZES[size]
    model = dataclasses.asdict(PRESETS[f"cm3leon-{size}"]) | {"dtype": "bfloat16", "remat": "full"}
    return ConfigDict(
        {
            "task": "lm",
            "run": {
                "steps": values["steps"],
                "log_every": 10,
                "eval_every": 5000,
                "mesh": {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1},
                "checkpoint": {"every": 1000, "keep": 3, "keep_every": 25_000},
            },
            "lm": {
                "model": model,
                "train": ({"path": "records/train"},),
                "valid": ({"path": "records/valid"},),
                "image_tokenizer": "runs/vqgan",
                "text_tokenizer": "text.model",
                "plan": {"length": 4096, "packing": "cut", "spans": "paper"},
                "cm3": {"whole_segment": 0.5},
                "batch_size": 2048,
                "optim": {"learning_rate": values["learning_rate"], "warmup_steps": 1500},
            },
        }
    )
