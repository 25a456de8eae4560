"""One configuration for many machines: rules that say how a run is laid out on a kind and number of devices.

A configuration file may hold `machines`, a tuple of rules. The rule of the devices at hand fills in the mesh, the
number of microbatches and what is recomputed; a value given on the command line stays as it was given.
"""

import copy
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from cm3jax.config import ConfigError, build, to_dict
from cm3jax.kernels.attention.dispatch import Backend
from cm3jax.models.remat import Remat
from cm3jax.parallel.mesh import MeshConfig, axis_sizes
from cm3jax.perf.hardware import device_name

# What a rule decides of the decoder.
MODEL_KEYS = ("remat", "scan_layers", "attention_backend")
# What a rule decides, and what may therefore change when a run goes on on other machines.
MACHINE_KEYS = ("run.mesh", "lm.accumulate", "lm.loss_chunk", *(f"lm.model.{name}" for name in MODEL_KEYS))


@dataclasses.dataclass(frozen=True)
class MachineRule:
    """How a run is laid out on one kind of device.

    Attributes:
      chip: name of the device in `perf.hardware` ("v5p", "h200"), or JAX's device kind where it has none ("cpu").
      devices: from so many devices on, up to the next rule of the same chip.
      microbatch: sequences that a device, with those that it shares tensors with, works on at once.
      remat, scan_layers, attention_backend: of the decoder.
      loss_tokens: tokens of a device whose logits are held at once.
      flags: the file launch/flags/FLAGS.sh with the compiler flags of these devices; by itself the one of `chip`.
    """

    chip: str
    mesh: MeshConfig
    microbatch: int
    remat: Remat
    devices: int = 1
    scan_layers: bool = True
    attention_backend: Backend = "auto"
    loss_tokens: int = 2048
    flags: str = ""

    def __post_init__(self):
        for name in ("devices", "microbatch", "loss_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")


def resolve(values: Mapping[str, Any], kind: str, count: int, overridden: Collection[str] = ()) -> dict[str, Any]:
    """The nested values of a configuration file for `count` devices of `kind`, without the group `machines`.

    Args:
      kind: JAX's device kind, or the short name of a device.
      overridden: dotted keys that the command line gave, which win over the rule. A mesh among them also lets the file
        be used on machines that it has no rule for.

    Raises:
      ConfigError: no rule for these devices, or one that does not fit the batch.
    """
    plain = copy.deepcopy(dict(values))
    rules = [build(MachineRule, rule, f"machines[{i}].") for i, rule in enumerate(plain.pop("machines", ()))]
    if not rules:
        return plain
    rule = find_rule(rules, kind, count)
    if rule is None:
        if any(key.startswith("run.mesh") for key in overridden):
            return plain
        known = ", ".join(f"{rule.chip} from {rule.devices} on" for rule in rules)
        raise ConfigError(
            f"no machine rule for {count} x {device_name(kind)}; known: {known}. For another machine give the mesh on "
            "the command line, for example --config.run.mesh.fsdp=-1"
        )
    return apply_rule(plain, rule, count, overridden)


def find_rule(rules: Collection[MachineRule], kind: str, count: int) -> MachineRule | None:
    """Of the rules for this device, the one with the largest number of devices up to `count`."""
    fitting = [rule for rule in rules if rule.chip == device_name(kind) and rule.devices <= count]
    return max(fitting, key=lambda rule: rule.devices, default=None)


def apply_rule(
    values: Mapping[str, Any], rule: MachineRule, count: int, overridden: Collection[str] = ()
) -> dict[str, Any]:
    """The nested values of a configuration with what `rule` says for `count` devices; see `resolve`.

    Raises:
      ConfigError: the mesh does not fit the devices, or the batch not the mesh.
    """
    filled = copy.deepcopy(dict(values))
    for axis, size in to_dict(rule.mesh).items():
        _fill(filled, f"run.mesh.{axis}", size, overridden)
    mesh = filled["run"]["mesh"]
    try:
        tensor = axis_sizes(build(MeshConfig, mesh, "run.mesh."), count)[-1]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows, batch = count // tensor, filled["lm"]["batch_size"]
    if batch % rows:
        raise ConfigError(f"lm.batch_size {batch} is not divisible by the {rows} device groups of the mesh {mesh}")
    each = batch // rows
    accumulate = -(-each // rule.microbatch)
    while each % accumulate:
        accumulate += 1
    _fill(filled, "lm.accumulate", accumulate, overridden)
    held = min(rule.loss_tokens, each // accumulate * filled["lm"]["plan"]["length"])
    _fill(filled, "lm.loss_chunk", rows * held, overridden)
    for name in MODEL_KEYS:
        _fill(filled, f"lm.model.{name}", getattr(rule, name), overridden)
    return filled


def _fill(values: dict[str, Any], key: str, value: Any, overridden: Collection[str]) -> None:
    if key in overridden:
        return
    *groups, name = key.split(".")
    for group in groups:
        values = values[group]
    values[name] = value
