"""A small decoder over a mixture of two sets of records, packed and cut: `tests/jobs/lm.py:FOLDER`."""

import dataclasses

from ml_collections import ConfigDict

from cm3jax.models.config import cm3leon


def get_config(folder: str) -> ConfigDict:
    vocabulary = {"text_size": 320, "image_size": 8, "sentinels": 8, "size": 352}
    model = dataclasses.replace(cm3leon(32, 2, 4, vocabulary["size"], 64), init_std=0.05, position_std=0.05)
    return ConfigDict(
        {
            "task": "lm",
            "seed": 3,
            "run": {
                "steps": 30,
                "log_every": 1,
                "mesh": {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1},
                "checkpoint": {"every": 5, "keep": 3},
                "reliability": {"hang_seconds": 60.0, "startup_seconds": 120.0, "check_replicas_every": 10},
            },
            "lm": {
                "model": dataclasses.asdict(model),
                "train": ({"path": f"{folder}/train", "repeat": 1.5}, {"path": f"{folder}/valid", "repeat": 0.5}),
                "valid": ({"path": f"{folder}/valid"},),
                "vocabulary": vocabulary,
                "image_tokenizer": "none",
                "text_tokenizer": "none",
                "plan": {"length": 64, "packing": "cut"},
                "batch_size": 8,
                "loss_chunk": 64,
                # Constant, so that a shorter run is the beginning of a longer one.
                "optim": {"learning_rate": 3e-4, "warmup_steps": 5, "decay": "constant"},
            },
        }
    )
