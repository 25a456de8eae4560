"""How the averages of the gradient that an optimizer keeps are stored between updates."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float

from cm3jax.optim import blocks
from cm3jax.parallel.specs import WEIGHTS

Kind = Literal["float32", "bfloat16", "int8"]

# At most so many neighbours share a scale.
BLOCK = 128
# Along an axis that `tensor` splits, blocks are short enough that so many parts have whole blocks.
TENSOR_PARTS = 8
# State fields of the wrapped transformations, and whether a field may be negative.
MOMENTS = {"mu": True, "nu": False}


def stored(
    inner: optax.GradientTransformation, kind: Kind, names: Mapping[tuple[Any, ...], str]
) -> optax.GradientTransformation:
    """`inner` with its moments kept as `kind`; every update computes in fp32. Weights of one dimension stay fp32.

    Rounding is random and unbiased, drawn from the state's own count: a run and its resumption draw the same.

    Args:
      inner: its state is a named tuple with a `count` and moments `mu` and perhaps `nu`.
      names: of the weights' specs, by path.
    """
    if kind == "float32":
        return inner

    def pack(state: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), state.count)
        return _changed(state, lambda name, path, x, number: _encode(kind, name, names[path], x, _key(key, number)))

    def unpack(state: Any) -> Any:
        return _changed(state, lambda name, path, x, _: _decode(name, names[path], x))

    def init(params: Any) -> Any:
        return pack(inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, unpack(state), params)
        return updates, pack(state)

    return optax.GradientTransformation(init, update)


def _changed(state: Any, change: Callable[[str, tuple[Any, ...], Any, int], Any]) -> Any:
    """`state` with each leaf x of its moments replaced by change(field, path, x, number of the leaf)."""
    fields = [name for name in MOMENTS if hasattr(state, name)]
    changed = {}
    for name in fields:
        flat, tree = jax.tree.flatten_with_path(getattr(state, name), is_leaf=_is_blocks)
        numbers = range(fields.index(name), len(fields) * len(flat), len(fields))
        leaves = [change(name, path, x, number) for (path, x), number in zip(flat, numbers, strict=True)]
        changed[name] = jax.tree.unflatten(tree, leaves)
    return state._replace(**changed)


def _key(key: jax.Array, number: int) -> jax.Array:
    return jax.random.fold_in(key, number)


def _encode(kind: Kind, field: str, name: str, x: Float[Array, "..."], key: jax.Array) -> Any:
    if len(WEIGHTS[name]) < 2:
        return x
    if kind == "bfloat16":
        return round_to_bfloat16(x, key)
    axis = block_axis(name)
    encode = blocks.encode_signed if MOMENTS[field] else blocks.encode_positive
    return encode(x, axis, block_size(x.shape[axis], WEIGHTS[name][axis] is not None), key)


def _decode(field: str, name: str, x: Any) -> Float[Array, "..."]:
    if not _is_blocks(x):
        return x.astype(jnp.float32)
    decode = blocks.decode_signed if MOMENTS[field] else blocks.decode_positive
    return decode(x, block_axis(name))


def block_axis(name: str) -> int:
    """The axis, counted from the end, along which weights of that name have their blocks.

    Never one that `fsdp` splits: it may split as far as single weights.
    """
    spec = WEIGHTS[name]
    whole = [axis for axis, entry in enumerate(spec) if entry is None]
    return (whole[-1] if whole else tuple(spec).index("tensor")) - len(spec)


def block_size(length: int, split: bool) -> int:
    """The largest power of two up to `BLOCK` by which the axis, or its part on each device, can be divided."""
    power = length & -length
    return min(max(power // TENSOR_PARTS, 1) if split else power, BLOCK)


def round_to_bfloat16(x: Float[Array, "..."], key: jax.Array) -> BFloat16[Array, "..."]:
    """One of the two neighbours in bfloat16, at random, so that the mean of many draws is `x` (finite).

    bfloat16 is fp32 without the lower half of its bits: a random number added to that half carries as often as it
    should.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _is_blocks(node: Any) -> bool:
    return isinstance(node, blocks.Blocks)
