"""MFU, time of the parts of a step, and memory of decoders of the paper's sizes on one accelerator."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from train_step import JaxTrainer, Shape, batch_of, lm_config, random_tokens

from cm3jax.models.config import PRESETS, TransformerConfig
from cm3jax.perf.flops import flops_per_token
from cm3jax.perf.peak import peak_flops

WARM_UPS = 3
LENGTH = 4096
# Sequences of a step and what is recomputed: as much as fits beside fp32 weights and moments in 80 GB.
MODELS: dict[str, tuple[TransformerConfig, int, str]] = {
    "350m": (PRESETS["cm3leon-350m"], 8, "dots"),
    "760m": (PRESETS["cm3leon-760m"], 4, "dots"),
    "7b, 8 layers": (dataclasses.replace(PRESETS["cm3leon-7b"], n_layers=8), 4, "dots"),
}


def measure_gpu(steps: int) -> dict[str, Any]:
    """A row a model; milliseconds are medians of `steps`."""
    return {"models": [_measure(name, *values, steps) for name, values in MODELS.items()]}


def _measure(name: str, model: TransformerConfig, batch: int, remat: str, steps: int) -> dict[str, Any]:
    shape = Shape(model.d_model, model.n_layers, min(LENGTH, model.max_len), batch, model.vocab_size)
    model = dataclasses.replace(model, dtype="bfloat16", remat=remat)
    trainer = JaxTrainer(dataclasses.replace(lm_config(shape), model=model, loss_chunk=4096))
    tokens, device = random_tokens(shape, 0), jax.devices()[0]
    seconds = _median_seconds(lambda: trainer.step(tokens), steps)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    batch_arrays = jax.device_put(batch_of(tokens))
    forward = jax.jit(lambda params, batch: trainer.task._losses(params, batch)[0])
    gradient = jax.jit(jax.grad(lambda params, batch: trainer.task._losses(params, batch)[0]))
    parts = [
        _median_seconds(lambda run=run: jax.block_until_ready(run(trainer.state.params, batch_arrays)), steps)
        for run in (forward, gradient)
    ]
    rate = shape.tokens / seconds
    return {
        "model": name,
        "batch": f"{batch} x {shape.length}, remat {remat}",
        "tokens/s": round(rate),
        "MFU": f"{rate * flops_per_token(model, shape.length) / peak_flops(device):.1%}",
        "step ms": round(1e3 * seconds, 1),
        "forward ms": round(1e3 * parts[0], 1),
        "backward ms": round(1e3 * (parts[1] - parts[0]), 1),
        "optimizer and checks ms": round(1e3 * (seconds - parts[1]), 1),
        "peak GB": round(peak / 1e9, 1),
    }


def _median_seconds(run: Callable[[], Any], steps: int) -> float:
    """Of calls that return when their results are there."""
    found = []
    for _ in range(WARM_UPS + steps):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return float(statistics.median(np.asarray(found[WARM_UPS:])))
