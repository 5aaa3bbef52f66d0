"""What a compiled program does, read from its text (optimised HLO) for one device.

`read_program` gives the instructions and how often each runs; `llamapro_jax.program` adds up what
they compute and move. Written for what XLA prints for CPU, GPU and TPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([\w\-]+)\((.*)$", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')

_BITS = {"pred": 8, "token": 0, "opaque": 0}
# What hands a value on as it is.
_SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "optimization-barrier")
# The second half of what `...-start` began; the computation in it is the same one.
_CONTINUES = ("async-update", "async-done")


@dataclass(frozen=True)
class Array:
    """The type of an array: dtype as XLA names it, dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            # f32, bf16, s4, f8e4m3fn: the first number is that of the bits; c64 likewise.
            bits = int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line. results: its array, or those of its tuple; arguments: the text between its
    parentheses; attributes: what follows them."""

    name: str
    results: tuple[Array, ...]
    operation: str
    arguments: str
    attributes: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_OPERAND.findall(self.arguments))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs."""
        if self.operation in _CONTINUES:
            return ()
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return tuple(names)

    @property
    def op_name(self) -> str:
        """The path of what it was in the program that was compiled, such as
        `jit(step)/while/body/dot_general`; empty where XLA made it up."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.results)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is one name, as in `body=%region_0.1`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A function of the program. parameters: the names of its parameters, in their order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def parameters(self) -> dict[int, str]:
        return {
            int(i.arguments): i.name
            for i in self.instructions.values()
            if i.operation == "parameter"
        }


@dataclass(frozen=True)
class Value:
    """A whole number in a loop: `offset`, plus what element `carried` of the loop's state is."""

    offset: int
    carried: int | None = None


@dataclass
class Program:
    """computations: by name, each after those that it runs."""

    computations: dict[str, Computation]
    entry: str

    @cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one run of the program.

        Every branch of a conditional counts as taken. Raises ValueError for a loop whose trips the
        text does not tell.
        """
        times = dict.fromkeys(self.computations, 0)
        times[self.entry] = 1
        for computation in reversed(self.computations.values()):
            for instruction in computation.instructions.values():
                if not instruction.called:
                    continue
                runs = times[computation.name]
                if instruction.operation == "while" and runs:
                    runs *= self.trips(computation, instruction)
                for name in instruction.called:
                    times[name] += runs
        return times

    @cached_property
    def fused(self) -> set[str]:
        """Computations whose inner values never lie in memory."""
        return {
            name
            for instruction, _ in self.instructions()
            if instruction.operation not in ("while", "conditional", "call")
            for name in instruction.called
        }

    def instructions(self) -> Iterator[tuple[Instruction, Computation]]:
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                yield instruction, computation

    # ------------------------------------------------------------- loops

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """How often the body of a `while` in a computation runs.

        From XLA's note where there is one; else from the condition, which compares a counter with a
        bound. Raises ValueError for any other loop.
        """
        if noted := _TRIPS.search(loop.attributes):
            return int(noted[1])
        unknown = ValueError(
            f"no known trip count of the loop {loop.name} ({loop.op_name or 'no name'})"
        )
        compared = self._comparison(self.computations[loop.attribute("condition")])
        if compared is None:
            raise unknown
        counter, limit, inclusive = compared
        if counter.carried is None:
            raise unknown
        start = self._at_start(computation, loop, counter)
        stop = self._at_start(computation, loop, limit)
        body = self.computations[loop.attribute("body")]
        after = self._element(body, body.instructions[body.root], counter.carried)
        if None in (start, stop, after) or after.carried != counter.carried or not after.offset:
            raise unknown
        if limit.carried is not None and not self._unchanged(body, limit.carried):
            raise unknown
        return max(0, -(-(stop - start + inclusive) // after.offset))

    def _comparison(self, condition: Computation) -> tuple[Value, Value, int] | None:
        """(counter, limit, 1 when the limit is still run) of a condition `counter < limit`."""
        root = condition.instructions[condition.root]
        arguments: list[Value | None] | None = None
        where = condition
        while root.operation in ("fusion", "call"):
            arguments = [self._value(where, name, arguments) for name in root.operands]
            where = self.computations[root.called[0]]
            root = where.instructions[where.root]
        direction = root.attribute("direction")
        if root.operation != "compare" or direction not in ("LT", "LE", "GT", "GE"):
            return None
        left, right = (self._value(where, name, arguments) for name in root.operands)
        if direction in ("GT", "GE"):
            left, right = right, left
        if left is None or right is None:
            return None
        return left, right, int(direction in ("LE", "GE"))

    def _unchanged(self, body: Computation, element: int) -> bool:
        root = body.instructions[body.root]
        return self._element(body, root, element) == Value(0, element)

    def _at_start(self, where: Computation, loop: Instruction, value: Value) -> int | None:
        """What a value of a loop's state is when the loop begins."""
        if value.carried is None:
            return value.offset
        state = where.instructions[loop.operands[0]]
        first = self._element(where, state, value.carried)
        if first is None:
            return None
        if first.carried is None:
            return first.offset + value.offset
        # The loop stands in another one, whose state holds the value and never changes it.
        for outer, caller in self.instructions():
            if outer.operation == "while" and outer.attribute("body") == where.name:
                if not self._unchanged(where, first.carried):
                    return None
                found = self._at_start(caller, outer, first)
                return None if found is None else found + value.offset
        return None

    def _element(
        self,
        where: Computation,
        of: Instruction,
        index: int,
        arguments: Sequence[Value | None] | None = None,
    ) -> Value | None:
        """Element `index` of the tuple that an instruction gives."""
        if of.operation == "tuple":
            return self._value(where, of.operands[index], arguments)
        if of.operation in _SAME:
            return self._element(where, where.instructions[of.operands[0]], index, arguments)
        if of.operation == "parameter" and arguments is None:
            return Value(0, index)
        if of.operation == "while":
            body = self.computations[of.attribute("body")]
            if self._unchanged(body, index):
                return self._element(where, where.instructions[of.operands[0]], index, arguments)
        if of.operation == "fusion":
            inner = self.computations[of.called[0]]
            given = [self._value(where, name, arguments) for name in of.operands]
            return self._element(inner, inner.instructions[inner.root], index, given)
        return None

    def _value(
        self, where: Computation, name: str, arguments: Sequence[Value | None] | None = None
    ) -> Value | None:
        """A scalar of a computation, whose parameters have the values `arguments` in a fusion."""
        instruction = where.instructions[name]
        operation, operands = instruction.operation, instruction.operands
        if operation == "constant":
            whole = re.fullmatch(r"-?\d+", instruction.arguments)
            return Value(int(whole[0])) if whole else None
        if operation == "parameter":
            return None if arguments is None else arguments[int(instruction.arguments)]
        if operation == "get-tuple-element":
            index = int(instruction.attribute("index"))
            return self._element(where, where.instructions[operands[0]], index, arguments)
        if operation in _SAME:
            return self._value(where, operands[0], arguments)
        if operation in ("add", "subtract"):
            left, right = (self._value(where, operand, arguments) for operand in operands)
            if left is None or right is None:
                return None
            if operation == "subtract":
                right = Value(-right.offset, right.carried)
                if right.carried is not None:
                    return None
            if None not in (left.carried, right.carried):
                return None
            carried = right.carried if left.carried is None else left.carried
            return Value(left.offset + right.offset, carried)
        if operation in ("fusion", "call"):
            inner = self.computations[instruction.called[0]]
            given = [self._value(where, operand, arguments) for operand in operands]
            return self._value(inner, inner.root, given)
        return None


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, `f32[2,3]{1,0}` or a tuple of such."""
    return tuple(
        Array(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", text))
    )


def _lines(text: str) -> Iterator[str]:
    """The lines of the text; one that an attribute broke is put together again."""
    pending = ""
    for line in text.splitlines():
        begins = line == "}" or _HEADER.match(line) or re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = ", line)
        if begins or not line:
            if pending:
                yield pending
            pending = line
        else:
            pending += "\n" + line
    yield pending


def _instruction(match: re.Match[str]) -> Instruction:
    _, name, result, operation, rest = match.groups()
    end = _closing(rest)
    return Instruction(name, arrays(result), operation, rest[:end], rest[end + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis closes that was open before the text."""
    depth = 1
    for parenthesis in re.finditer(r"[()]", text):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.start()
    return len(text)


def read_program(text: str) -> Program:
    """The program in the text that `Compiled.as_text()` gives. Raises ValueError without one."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in _lines(text):
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match)
            current.instructions[instruction.name] = instruction
            if match[1]:
                current.root = instruction.name
    if not entry:
        raise ValueError("the text has no ENTRY computation; it is no compiled program")
    return Program(computations, entry)
