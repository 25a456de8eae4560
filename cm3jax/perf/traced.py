"""Forward FLOPs of any function, counted from the shapes of the products it is traced into."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def forward_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of the convolutions and matrix products that `function(*arguments)` makes; nothing is computed.

    A product of an m x k by a k x n matrix counts 2 m k n; a convolution 2 x output elements x inputs of one output, as
    if no input were padding. A `scan` counts its body as often as it runs, a `cond` its dearest branch, a
    `shard_map` its body on every device, and a Pallas kernel every cell of its grid, also those that a mask skips.

    Args:
      arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            inner = [_count(body) for body in _bodies(equation)]
            total += _repeats(equation) * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def _repeats(equation: core.JaxprEqn) -> int:
    parameters = equation.params
    match equation.primitive.name:
        case "scan":
            return parameters["length"]
        case "shard_map":
            return parameters["mesh"].size
        case "pallas_call":
            return math.prod(parameters["grid_mapping"].grid)
    return 1


def _product(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted)


def _convolution(equation: core.JaxprEqn) -> float:
    kernel = _shape(equation.invars[1])
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / outputs


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
