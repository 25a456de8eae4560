"""What an optimizer is made of, and its learning rate."""

import dataclasses
import typing
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer with warm-up and decay to `final_ratio` of the peak (CM3Leon's family: AdamW, linear to 10 %).

    Attributes:
      name: `muon` updates the hidden matrices by Muon and all other weights by AdamW, at the same learning rate.
      moments: how the averages of the gradient are stored; `int8` in blocks, see `optim.blocks`.
      momentum: of Muon.

    Raises:
      ValueError: a name that does not exist.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    warmup_steps: int = 1500
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    momentum: float = 0.95

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in ("name", "decay", "moments"):
            known, found = typing.get_args(hints[field]), getattr(self, field)
            if found not in known:
                raise ValueError(f"optim.{field} is {found!r}, expected one of {', '.join(known)}")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate after each of `steps` updates."""
    rest = max(1, steps - config.warmup_steps)
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(1, config.warmup_steps))
    tails = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_ratio, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest, config.final_ratio),
    }
    return optax.join_schedules([warmup, tails[config.decay]()], [config.warmup_steps])
