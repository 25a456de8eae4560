"""Bytes that a compiled program moves between a device's main memory and its cores.

Every instruction reads its operands and writes its result once; what lies in on-chip memory costs nothing, a slice
costs its own size and not that of the array it is cut from, and an update in place costs what it writes.
"""

import dataclasses

from cm3jax.perf.hlo import Instruction, Module
from cm3jax.perf.products import PRODUCTS, product_flops

_FREE = (
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("while", "conditional", "call", "partition-id", "replica-id", "add-dependency", "opt-barrier"),
    *(
        "copy-done",
        "slice-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "send",
        "send-done",
        "recv",
        "recv-done",
    ),
    *("async-start", "async-update", "async-done"),
)
# Targets of custom calls that say something and do nothing.
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")
_COPIES = ("copy-start", "slice-start")
_BESIDE = (*_COPIES, "custom-call")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_PLAIN = ("bitcast", "copy", "convert", "reshape", "transpose")


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction that multiplies matrices (a fusion around a product, or a kernel): bytes and FLOPs each time."""

    bytes: float
    flops: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of the program does on one device.

    Attributes:
      products: instructions that multiply matrices.
      kernels: bytes of custom kernels, whose arithmetic the text does not show, and of copies between memories.
      others: bytes of everything else.
    """

    products: tuple[Work, ...]
    kernels: float
    others: float

    @property
    def bytes(self) -> float:
        """All of them together."""
        return sum(work.runs * work.bytes for work in self.products) + self.kernels + self.others


def memory_traffic(module: Module) -> Traffic:
    """Sums over all computations that run, each as often as it runs.

    Raises:
      ValueError: a loop without a known number of rounds.
    """
    fused = {
        name
        for body in module.computations.values()
        for instruction in body.values()
        if instruction.opcode == "fusion"
        for name in instruction.called
    }
    products, kernels, others = [], 0.0, 0.0
    for name, body in module.computations.items():
        runs = module.runs[name]
        if name in fused or not runs:
            continue
        for instruction in body.values():
            size, flops = _bytes(module, body, instruction), _flops(module, body, instruction)
            if flops:
                products.append(Work(size, flops, runs))
            elif instruction.opcode in _BESIDE:
                kernels += runs * size
            else:
                others += runs * size
    return Traffic(tuple(products), kernels, others)


def _flops(module: Module, body: dict[str, Instruction], instruction: Instruction) -> float:
    if instruction.opcode in PRODUCTS:
        return product_flops(instruction, body)
    if instruction.opcode != "fusion":
        return 0.0
    bodies = [module.computations[name] for name in instruction.called]
    return sum(_flops(module, inner, one) for inner in bodies for one in inner.values())


def _bytes(module: Module, body: dict[str, Instruction], instruction: Instruction) -> int:
    if instruction.opcode in _FREE or any(f'"{target}"' in instruction.text for target in _FREE_CALLS):
        return 0
    if instruction.opcode in _COPIES:
        # (to, from, context) of a copy; (whole, part, context) of a slice, of which the part alone is moved.
        return sum(instruction.shapes[1].bytes for shape in instruction.shapes[:2] if not shape.space)
    if instruction.opcode in _SLICES:
        return 2 * _size(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(body[instruction.operands[1]])
    if instruction.opcode == "fusion":
        return _fusion_reads(module, body, instruction) + _fusion_writes(module, instruction)
    return _size(instruction) + sum(_size(body[name]) for name in instruction.operands if name in body)


def _size(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if not shape.space)


def _fusion_reads(module: Module, body: dict[str, Instruction], fusion: Instruction) -> int:
    total = 0
    for place, name in enumerate(fusion.operands):
        size = _size(body[name]) if name in body else 0
        if size:
            total += min(size, _read_inside(module, fusion.called[0], place, size))
    return total


def _read_inside(module: Module, computation: str, place: int, size: int) -> int:
    """Bytes that a fused computation reads of its parameter number `place`, which has `size` bytes."""
    inner = module.computations[computation]
    parameter = next(i for i in inner.values() if i.opcode == "parameter" and int(i.inside) == place)
    seen, front, total = {parameter.name}, [parameter.name], 0
    while front:
        current = front.pop()
        for user in inner.values():
            if current not in user.operands:
                continue
            if user.opcode in _PLAIN and not user.root:
                seen.add(user.name)
                front.append(user.name)
            elif user.opcode in _SLICES and user.operands[0] in seen:
                total += _whole(user)
            elif user.opcode == "fusion":
                total += _read_inside(module, user.called[0], user.operands.index(current), size)
            elif user.opcode not in _UPDATES or user.operands[0] not in seen:
                return size
    return total


def _fusion_writes(module: Module, fusion: Instruction) -> int:
    inner = module.computations[fusion.called[0]]
    root = next(i for i in inner.values() if i.root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.shapes):
        return _size(fusion)
    pairs = zip(parts, fusion.shapes, strict=True)
    return sum(min(shape.bytes, _written_inside(module, inner, part)) for part, shape in pairs if not shape.space)


def _written_inside(module: Module, inner: dict[str, Instruction], result: Instruction) -> int:
    while result.opcode in _PLAIN and result.operands[0] in inner:
        result = inner[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return _whole(inner[result.operands[1]])
    if result.opcode == "fusion":
        nested = module.computations[result.called[0]]
        return _written_inside(module, nested, next(i for i in nested.values() if i.root))
    return _whole(result)


def _whole(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes)
