"""Tokens per second and peak memory of a training step.

    python benchmarks/train_step.py --width 512 --layers 8 --length 512 --batch 4
    python benchmarks/train_step.py --gpu

On a CPU the update of task `lm` (everything a run does in a step: loss, gradients, clipping, AdamW, checks) runs beside
the same model in plain PyTorch: fp32, two cores, equal weights, losses first compared to 1e-5. Both run in one process,
under the settings of launch/flags/cpu.sh, in the order ABBA, a step at a time or `--turn` steps: the first step after
the other side takes longer on either side. Peak memory is that of a process of its own for
each: the highest resident size, less what was resident after imports. Our side recomputes norms and activations in the
backward pass (`remat="dots"`).

With `--gpu` there is no PyTorch: the share of the peak arithmetic rate (MFU) of 350M, 760M and eight layers of 7B at
4,096 tokens in bfloat16, with the formula of `cm3jax/perf/flops.py`; see train_step_gpu.py for other settings.

Needs `pip install -e '.[convert]'` for PyTorch. Writes benchmarks/results/train_step-DATE.json and .md.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import RESULTS, header, run_under_flags, table, write

CORES = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder and its batch."""

    width: int
    layers: int
    length: int
    batch: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def main() -> None:
    options = _options()
    if options.gpu:
        from train_step_gpu import measure_gpu

        # Processes that measure come first: this one would take the device's memory.
        found = measure_gpu(options.steps)
        report = header() | found
    else:
        run_under_flags("cpu")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        shape = Shape(options.width, options.layers, options.length, options.batch, options.vocabulary)
        if options.memory_of:
            print(json.dumps(_resident(options.memory_of, shape, options.steps)))
            return
        report = _compare(shape, options.steps, options.turn)
    name = "train_step_gpu" if options.gpu else "train_step"
    write(name, "Training step", report, _table(report), options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=24, help="measured steps of each side")
    parser.add_argument("--turn", type=int, default=1, help="steps that a side takes before the other has its turn")
    parser.add_argument("--gpu", action="store_true", help="measure MFU on the first accelerator instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--memory-of", choices=("jax", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn < 1 or options.steps < 2 * options.turn or options.steps % (2 * options.turn):
        parser.error(f"--steps {options.steps}, expected a multiple of two turns of {options.turn}")
    return options


class JaxTrainer:
    """The compiled update of task `lm` on one device."""

    def __init__(self, config: Any):
        import jax

        from cm3jax.parallel.mesh import one_device
        from cm3jax.reliability.heap import return_freed_memory
        from cm3jax.tasks.lm import LMTask
        from cm3jax.tasks.update import FLAGS, Flags, abstract_state, lower_update

        self.jax, self.task = jax, LMTask(config, seed=0, steps=1)
        mesh = one_device()
        jax.set_mesh(mesh)
        layout = jax.tree.map(lambda a: a.sharding, abstract_state(self.task, mesh))
        self.state = jax.jit(self.task.init, out_shardings=layout)(jax.random.key(0))
        self.update = lower_update(self.task, mesh, self.state).compile()
        return_freed_memory()
        self.quiet = Flags(mesh, FLAGS).raised([False] * FLAGS)

    def step(self, tokens: Any) -> float:
        batch = self.jax.tree.map(self.jax.numpy.asarray, batch_of(tokens))
        self.state, metrics, _ = self.update(self.state, batch, self.quiet)
        self.jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def loss(self, tokens: Any) -> float:
        found = self.jax.jit(self.task._losses)(self.state.params, batch_of(tokens))
        return float(found[1]["loss"][0] / found[1]["loss"][1])


def lm_config(shape: Shape) -> Any:
    """Of the task; records and tokenizers are never opened."""
    from cm3jax.data.plan import PlanConfig
    from cm3jax.models.config import cm3leon
    from cm3jax.tasks.lm import DatasetConfig, LMConfig
    from cm3jax.tokens.vocabulary import Vocabulary

    sizes = {"text_size": shape.vocabulary // 2, "image_size": shape.vocabulary // 4, "sentinels": 64}
    model = cm3leon(shape.width, shape.layers, max(shape.width // 64, 1), shape.vocabulary, shape.length)
    return LMConfig(
        # Residual outputs that are not zero, so that equal losses say that all of the model is equal.
        model=dataclasses.replace(model, zero_init_residual=False, init_std=0.02, remat="dots"),
        train=(DatasetConfig("none"),),
        valid=(DatasetConfig("none"),),
        image_tokenizer="none",
        text_tokenizer="none",
        plan=PlanConfig(shape.length),
        vocabulary=Vocabulary(**sizes, size=shape.vocabulary),
        optim=optim_config(),
        batch_size=shape.batch,
        loss_chunk=512,
    )


def optim_config() -> Any:
    from cm3jax.optim import OptimConfig

    return OptimConfig(learning_rate=1e-4, warmup_steps=0, decay="constant")


def batch_of(tokens: Any) -> dict[str, Any]:
    import numpy as np

    return {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)}


def random_tokens(shape: Shape, seed: int) -> Any:
    import numpy as np

    # From the text ids on: no token of the objective's own among them.
    rng = np.random.default_rng(seed)
    return rng.integers(4, shape.vocabulary // 2, (shape.batch, shape.length + 1), dtype=np.int32)


def _torch_trainer(shape: Shape) -> Any:
    from torch_decoder import Trainer

    return Trainer(lm_config(shape).model, optim_config(), CORES)


def _compare(shape: Shape, steps: int, turn: int) -> dict[str, Any]:
    memory = {side: _memory_of(side, shape) for side in ("jax", "torch")}
    ours, theirs = JaxTrainer(lm_config(shape)), _torch_trainer(shape)
    theirs.model.load(ours.state.params)
    losses = ours.loss(random_tokens(shape, 0)), theirs.loss(random_tokens(shape, 0)).item()
    difference = abs(losses[0] - losses[1]) / losses[1]
    if difference > 1e-5:
        raise SystemExit(f"losses differ: {losses[0]} (cm3jax), {losses[1]} (PyTorch), expected 1e-5 at most")
    seconds = _alternate({"jax": ours.step, "torch": theirs.step}, shape, steps, turn)
    rates = {side: [shape.tokens / s for s in found] for side, found in seconds.items()}
    pairs = [a / b for a, b in zip(_turns(rates["jax"], turn), _turns(rates["torch"], turn), strict=True)]
    import torch

    return header() | {
        "shape": dataclasses.asdict(shape),
        "turn": turn,
        "torch": torch.__version__,
        "loss_difference": difference,
        "tokens_per_second": {side: statistics.median(found) for side, found in rates.items()},
        "seconds": seconds,
        "ratio": statistics.median(rates["jax"]) / statistics.median(rates["torch"]),
        "ratio_spread": [min(pairs), max(pairs)],
        "peak_mb": memory,
    }


def _alternate(sides: dict[str, Callable[[Any], float]], shape: Shape, steps: int, turn: int) -> dict[str, list[float]]:
    """Seconds of each step, in turns in the order A B B A, after two warm-ups of each."""
    names, seconds = list(sides), {name: [] for name in sides}
    for number in range(2):
        for name in names:
            sides[name](random_tokens(shape, number))
    for first in range(0, steps, turn):
        for name in names if first // turn % 2 == 0 else reversed(names):
            for number in range(first, first + turn):
                tokens = random_tokens(shape, 2 + number)
                start = time.perf_counter()
                sides[name](tokens)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _turns(values: list[float], turn: int) -> list[float]:
    """The median of each turn."""
    return [statistics.median(values[i : i + turn]) for i in range(0, len(values), turn)]


def _memory_of(side: str, shape: Shape) -> dict[str, float]:
    """MB of a process that trains for a few steps; both sides get the same environment."""
    sizes = [item for name, value in dataclasses.asdict(shape).items() for item in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--memory-of", side, "--steps", "4", *sizes]
    # Freed memory goes back to the system at once, so that the highest resident size is of memory in use.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process that measures {side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(side: str, shape: Shape, steps: int) -> dict[str, float]:
    """MB above what is resident after imports: the peak of all, and that of steps alone (without compiling)."""
    if side == "jax":
        import jax

        import cm3jax.tasks.lm  # noqa: F401

        jax.devices()
    else:
        import torch_decoder  # noqa: F401
    baseline = _status("VmRSS")
    trainer = JaxTrainer(lm_config(shape)) if side == "jax" else _torch_trainer(shape)
    trainer.step(random_tokens(shape, 0))
    # Linux forgets the highest resident size when told so.
    Path("/proc/self/clear_refs").write_text("5")
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    for number in range(steps):
        trainer.step(random_tokens(shape, number))
    steady = _status("VmHWM")
    return {"all": max(started, steady) - baseline, "steps": steady - baseline}


def _status(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def _table(report: dict[str, Any]) -> str:
    if "models" in report:
        names = [name for name in report["models"][0] if name != "kernels"]
        return table(names, [[str(row[n]) for n in names] for row in report["models"]])
    shape, rates, memory = report["shape"], report["tokens_per_second"], report["peak_mb"]
    low, high = report["ratio_spread"]
    return (
        f"{shape['layers']} layers x {shape['width']}, {shape['batch']} x {shape['length']} tokens, vocabulary "
        f"{shape['vocabulary']}, fp32, {CORES} cores, torch {report['torch']}; losses differ by "
        f"{report['loss_difference']:.1e}.\n\n| | cm3jax | PyTorch | ratio |\n| --- | --- | --- | --- |\n"
        f"| tokens/s, median of {len(report['seconds']['jax'])} | {rates['jax']:.0f} | {rates['torch']:.0f} | "
        f"{report['ratio']:.3f} (turns: {low:.3f} to {high:.3f}) |\n"
        + "".join(
            f"| peak MB, {label} | {memory['jax'][key]:.0f} | {memory['torch'][key]:.0f} | "
            f"{memory['jax'][key] / memory['torch'][key]:.3f} |\n"
            for key, label in (("steps", "steps alone"), ("all", "with the start and compiling"))
        )
    )


if __name__ == "__main__":
    main()
