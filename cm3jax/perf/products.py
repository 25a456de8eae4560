"""FLOPs of the matrix products of a compiled program, one instruction at a time.

TPU compilers write every product as a convolution, batch dimensions as spatial ones; only the pairs of an output and a
kernel position that meet an element of the input count, not those that meet padding or the gaps of a dilation.
"""

import math
import re

import numpy as np

from cm3jax.perf.hlo import Instruction, Shape

PRODUCTS = ("convolution", "dot")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def product_flops(instruction: Instruction, body: dict[str, Instruction]) -> float:
    """FLOPs of one `dot` or `convolution`, two for each multiplication; `body` holds its operands."""
    (out,) = instruction.shapes
    left, right = (body[name].shapes[0] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        found = _CONTRACTED.search(instruction.text)
        contracted = [int(i) for i in found.group(1).split(",") if i] if found else []
        return 2.0 * math.prod(out.dims) * math.prod(left.dims[i] for i in contracted)
    return _convolution_flops(instruction.text, left, right, out)


def _convolution_flops(text: str, left: Shape, right: Shape, out: Shape) -> float:
    labels, window = _LABELS.search(text), _WINDOW.search(text)
    assert labels is not None, text
    inputs, kernel, outputs = (
        dict(zip(label, shape.dims, strict=True))
        for label, shape in zip(labels.groups(), (left, right, out), strict=True)
    )
    total = 2.0 * outputs["b"] * outputs["f"] * kernel["i"]
    given = dict(word.split("=") for word in window.group(1).split()) if window else {}
    for place, label in enumerate(sorted(label for label in kernel if label.isdecimal())):
        settings = {name: value.split("x")[place] for name, value in given.items()}
        total *= _meetings(inputs[label], kernel[label], outputs[label], settings)
    return total


def _meetings(inputs: int, kernel: int, outputs: int, settings: dict[str, str]) -> int:
    """Pairs of an output and a kernel position along one dimension that meet an element of the input."""
    low = int(settings.get("pad", "0_0").split("_")[0])
    gap = int(settings.get("lhs_dilate", "1"))
    starts = np.arange(outputs) * int(settings.get("stride", "1")) - low
    places = starts[:, None] + np.arange(kernel) * int(settings.get("rhs_dilate", "1"))
    return int(((places >= 0) & (places <= (inputs - 1) * gap) & (places % gap == 0)).sum())
