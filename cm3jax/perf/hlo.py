"""Compiled programs as text (XLA's HLO): computations, their instructions, and how often each runs.

`jax.stages.Compiled.as_text()` gives the text. Only what cost formulas need is read: shapes, operands, attributes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_CONSTANT = re.compile(r"constant\((\d+)\)")
# Their bodies are applied to single elements, which are no program of their own.
_ELEMENTWISE_CALLERS = ("reduce", "reduce-window", "map", "sort", "scatter", "select-and-scatter")
_COLLECTIVE_REDUCTIONS = ("all-reduce", "all-reduce-start", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Type and dimensions of an array; `space` is the memory it lies in, 0 for a device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits.group()) if digits else 0
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line; `shapes` are the leaves of its result, `text` the attributes after its operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    text: str
    root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run when this instruction does."""
        if self.opcode in _ELEMENTWISE_CALLERS + _COLLECTIVE_REDUCTIONS:
            return ()
        return tuple(name for group in _CALLED.findall(self.text) for name in _NAME.findall(group))


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: instructions by name, for each computation by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program; every branch of a conditional counts.

        Raises:
          ValueError: a loop whose number of rounds is not in the text.
        """
        counts = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                rounds = self.rounds(instruction) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    visit(called, times * rounds)

        visit(self.entry, 1)
        return counts

    def rounds(self, loop: Instruction) -> int:
        """How often the body of a `while` runs.

        Raises:
          ValueError: it cannot be told.
        """
        known = _TRIP_COUNT.search(loop.text)
        if known:
            return int(known.group(1))
        condition = _CONDITION.search(loop.text)
        limits = list(self._constants(condition.group(1))) if condition else []
        if len(limits) != 1:
            raise ValueError(f"the loop {loop.name} does not say how often it runs")
        return limits[0]

    def _constants(self, name: str) -> Iterator[int]:
        for instruction in self.computations[name].values():
            found = _CONSTANT.search(f"{instruction.opcode}({instruction.inside})")
            if found:
                yield int(found.group(1))
            for called in instruction.called:
                yield from self._constants(called)


def parse(text: str) -> Module:
    """Reads a whole module.

    Raises:
      ValueError: `text` has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith("HloModule"):
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            instruction = _instruction(line[start.end() :], start.group(2), bool(start.group(1)))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no entry computation: the text is not that of a compiled HLO module")
    return Module(computations, entry)


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else 0
    opcode = _OPCODE.search(rest, end)
    # A scalar or array shape may hold parentheses of tiles: T(8,128). They follow a capital letter, opcodes do not.
    assert opcode is not None, rest
    opening = opcode.end() - 1
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=opcode.group(1),
        shapes=tuple(_shapes(rest[: opcode.start()])),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        text=rest[closing + 1 :],
        root=root,
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, int(space.group(1)) if space else 0)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
