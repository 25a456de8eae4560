"""MFU, what the time goes to, and memory of training steps of decoders of the paper's sizes on one accelerator.

    python benchmarks/train_step.py --gpu
    python benchmarks/train_step_gpu.py 350m --batch 16 --remat none --scan-layers

The second form tries one model with other settings, and writes no result file.
"""

import argparse
import collections
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from report import run_under_flags

from cm3jax.models.config import PRESETS, TransformerConfig
from cm3jax.models.remat import Remat

LENGTH = 4096
WARM_UPS = 3
ROUNDS = 5
# Kernels that take the most time, of which the result file names so many.
LISTED = 15
# Parts of the names of kernels: of cuDNN's attention, and of products by cuBLAS, CUTLASS and Triton.
KINDS = {"attention": ("sdpa", "fmha", "flash"), "products": ("nvjet", "gemm", "cutlass", "xmma", "dot")}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and how its step is laid out; what is below fits in 80 GB."""

    model: TransformerConfig
    batch: int
    remat: Remat = "dots"
    scan_layers: bool = False
    loss_chunk: int = 8192


MODELS = {
    "350m": Setup(PRESETS["cm3leon-350m"], 16),
    "760m": Setup(PRESETS["cm3leon-760m"], 12),
    "7b-8-layers": Setup(dataclasses.replace(PRESETS["cm3leon-7b"], n_layers=8), 12),
}


def measure_gpu(steps: int) -> dict[str, Any]:
    """A row for each model, measured in a process of its own: the highest use of memory is that of a process."""
    return {"models": [_in_process(name, steps) for name in MODELS]}


def _in_process(name: str, steps: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, name, "--steps", str(steps)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the process that measures {name} failed with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, setup: Setup, steps: int) -> dict[str, Any]:
    """Rounds of `steps` updates that follow each other as in training: the host waits at the end of a round."""
    import jax
    from train_step import JaxTrainer, Shape, batch_of, lm_config, random_tokens

    from cm3jax.perf.flops import flops_per_token
    from cm3jax.perf.hardware import peak_flops

    model, device = setup.model, jax.devices()[0]
    model = dataclasses.replace(model, dtype="bfloat16", remat=setup.remat, scan_layers=setup.scan_layers)
    shape = Shape(model.d_model, model.n_layers, min(LENGTH, model.max_len), setup.batch, model.vocab_size)
    started = time.perf_counter()
    trainer = JaxTrainer(dataclasses.replace(lm_config(shape), model=model, loss_chunk=setup.loss_chunk))
    compiling = time.perf_counter() - started
    batch = jax.tree.map(jax.numpy.asarray, batch_of(random_tokens(shape, 0)))

    def updates(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            trainer.state, _, _ = trainer.update(trainer.state, batch, trainer.quiet)
        jax.block_until_ready(trainer.state)
        return (time.perf_counter() - start) / count

    updates(WARM_UPS)
    seconds = [updates(steps) for _ in range(ROUNDS)]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    rates = [shape.tokens * flops_per_token(model, shape.length) / s for s in seconds]
    median = statistics.median(seconds)
    kernels = kernel_milliseconds(lambda: updates(steps), steps)
    layers = "scanned" if setup.scan_layers else "unrolled"
    return {
        "model": name,
        "step": f"{setup.batch} x {shape.length}, remat {setup.remat}, {layers}",
        "tokens/s": round(shape.tokens / median),
        "TFLOP/s": round(statistics.median(rates) / 1e12, 1),
        "MFU": f"{statistics.median(rates) / peak_flops(device):.1%}",
        "MFU of rounds": f"{min(rates) / peak_flops(device):.1%} to {max(rates) / peak_flops(device):.1%}",
        "step ms": round(1e3 * median, 1),
        **{f"{kind} ms": round(value, 1) for kind, value in _by_kind(kernels).items()},
        "peak GB": round(peak / 1e9, 1),
        "compiling s": round(compiling, 1),
        "kernels": [(kernel[:120], round(ms, 2)) for kernel, ms in kernels.most_common(LISTED)],
    }


def kernel_milliseconds(run: Callable[[], Any], steps: int) -> collections.Counter[str]:
    """Milliseconds of a step in each kernel, of a traced `run` of `steps` steps."""
    import jax

    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                    for event in line.events if line.name.startswith("Stream") else ():
                        found[event.name] += event.duration_ns / 1e6 / steps
    return found


def _by_kind(kernels: collections.Counter[str]) -> dict[str, float]:
    """Sums of KINDS and of all else; kernels that run beside each other count each."""
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, milliseconds in kernels.items():
        kinds = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
        sums[next(kinds, "other")] += milliseconds
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=10, help="updates of a round")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--remat", choices=get_args(Remat))
    parser.add_argument("--scan-layers", action=argparse.BooleanOptionalAction)
    parser.add_argument("--loss-chunk", type=int, help="tokens whose logits are held at once")
    options = vars(parser.parse_args())
    run_under_flags("gpu")
    name, steps = options.pop("model"), options.pop("steps")
    given = {key: value for key, value in options.items() if value is not None}
    print(json.dumps(measure(name, dataclasses.replace(MODELS[name], **given), steps)))


if __name__ == "__main__":
    main()
