"""A parser for the text of HLO that XLA has optimized, for any platform. No JAX."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}  # other names end with the number of bits: f32, s8, u16
# Operations that neither read nor write memory by themselves.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_PREFETCHES = {"copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done", "custom-call"}
_CALLS = {"while", "conditional", "call"}


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # as printed; "(f32[2,3]{1,0}, s32[])" for several arrays
    op: str
    arguments: str  # "(%a, %b)"
    attributes: str
    is_root: bool

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-#]+)", self.arguments)

    @cached_property
    def arrays(self) -> list[tuple[str, int]]:
        """Each array of the result: its dtype and shape, such as "f32[2,3]", and its bytes."""
        shapes = [(dtype, dims) for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.shape)]
        sizes = [math.prod(int(n) for n in dims.split(",") if n) * _bytes(dtype) for dtype, dims in shapes]
        return [(f"{dtype}[{dims}]", size) for (dtype, dims), size in zip(shapes, sizes, strict=True)]

    @cached_property
    def padded(self) -> list[tuple[int, bool]]:
        """Each array of the result on a TPU: its bytes with the padding of its layout, and whether it is in HBM."""
        arrays: list[tuple[int, bool]] = []
        for dtype, dims, order, rest in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?", self.shape):
            sizes = [int(n) for n in dims.split(",") if n]
            tile = re.search(r"T\(([\d,]+)\)", rest)
            minor = [int(n) for n in order.split(",") if n]  # from the minor dimension to the major one
            for axis, step in zip(minor, reversed(tile[1].split(",")) if tile else (), strict=False):
                sizes[axis] = math.ceil(sizes[axis] / int(step)) * int(step)
            arrays.append((math.prod(sizes) * _bytes(dtype), re.search(r"S\(\d+\)", rest) is None))
        return arrays

    @property
    def hbm_bytes(self) -> int:
        return sum(size for size, in_hbm in self.padded if in_hbm)

    @property
    def is_prefetch(self) -> bool:
        """Whether it copies from a TPU's HBM to the memory beside the processor, S(1), where arrays are used."""
        return "S(1)" in self.shape and self.op in _PREFETCHES

    @cached_property
    def called(self) -> dict[str, str]:
        """The computations that it calls, by role: calls, to_apply, body, condition, branch 0, branch 1, ..."""
        roles = "calls|to_apply|body|condition|true_computation|false_computation"
        named = dict(re.findall(rf"\b({roles})=%?([\w.\-]+)", self.attributes))
        branches = re.search(r"(?:branch|called)_computations=\{([^}]*)\}", self.attributes)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return named | {f"branch {i}": name for i, name in enumerate(names)}

    @cached_property
    def group_size(self) -> int | None:
        """The number of devices that take part in a collective; None if the text does not say."""
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", self.attributes):
            return listed[1].count(",") + 1
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", self.attributes):
            return int(iota[1])
        if named := re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", self.attributes):  # by mesh axis
            sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
            return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", named[2]))
        return None


def _bytes(dtype: str) -> int:
    digits = re.search(r"\d+$", dtype)
    return math.ceil((_BITS.get(dtype) or (int(digits[0]) if digits else 0)) / 8)


class Program:
    """A parsed HLO module: computations by name, and in each the instructions by name, in order of execution."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line)
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = header[2]
                self.computations[current] = {}
                self.entry = current if header[1] else self.entry
            elif current and (instruction := _parse(line)):
                here = self.computations[current]
                for name in instruction.operands:  # in newer versions, "%a#1" is element 1 of the tuple %a
                    parent, _, index = name.partition("#")
                    if index and name not in here:
                        shape, place = _elements(here[parent].shape)[int(index)], f", index={index}"
                        here[name] = Instruction(name, shape, "get-tuple-element", f"(%{parent})", place, False)
                here[instruction.name] = instruction

    def executed(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Each computation's name, instruction and the number of times it runs, those inside fusions included.

        Each branch of a conditional counts once, and so does the body of a loop whose trip count is unknown.
        """
        name = computation or self.entry
        for instruction in self.computations[name].values():
            yield name, instruction, times
            turns = self.trip_count(name, instruction) or 1
            for role, called in instruction.called.items():
                if called in self.computations and role != "to_apply":  # the addition within a reduction
                    yield from self.executed(called, times * turns)

    def written_out(self, computation: str) -> Iterator[Instruction]:
        """Instructions of a computation, its loops, branches and calls, without those within fusions.

        Their results are written to memory, which costs bandwidth.
        """
        for instruction in self.computations[computation].values():
            yield instruction
            if instruction.op in _CALLS:
                for name in instruction.called.values():
                    yield from self.written_out(name)

    def loops(self, computation: str | None = None) -> list[Instruction]:
        return [i for i in self.written_out(computation or self.entry) if i.op == "while"]

    def large_results(self, computation: str, least: int) -> list[Instruction]:
        """Instructions that write a new array of at least `least` bytes: no updates in place, no prefetches."""
        return [
            i
            for i in self.written_out(computation)
            if i.op not in _FREE
            and not i.is_prefetch
            and any(size >= least and not kept for (_, size), kept in zip(i.arrays, self.in_place(i), strict=True))
        ]

    def in_place(self, instruction: Instruction) -> list[bool]:
        """For each array of the result: whether it is a dynamic-update-slice of an operand.

        If the operand is used again afterwards, XLA copies it first, in another instruction.
        """
        inside = self.computations.get(instruction.called.get("calls", ""), {})
        if instruction.op != "fusion" or not inside:
            return [instruction.op == "dynamic-update-slice"] * len(instruction.arrays)
        root = next(i for i in inside.values() if i.is_root)
        results = [_through_bitcasts(inside, name) for name in (root.operands if root.op == "tuple" else [root.name])]
        return [
            i.op == "dynamic-update-slice" and _through_bitcasts(inside, i.operands[0]).op == "parameter"
            for i in results
        ] * (len(instruction.arrays) // len(results))

    def bytes_read(self, computation: str) -> int:
        """Bytes that one run of a computation reads from a TPU's HBM, with the padding of layouts.

        Of an array that is read in part, by a slice or a gather, the part counts. What is updated in place does not.
        """
        total, body = 0, self.computations[computation]
        for instruction in body.values():
            if instruction.op in _CALLS:
                turns = self.trip_count(computation, instruction) or 1
                total += sum(turns * self.bytes_read(name) for name in instruction.called.values())
            elif instruction.op not in _FREE and not instruction.op.endswith("-done"):
                for position, name in enumerate(instruction.operands):
                    total += self._read_of(instruction, position, body[name].hbm_bytes)
        return total

    def _read_of(self, instruction: Instruction, position: int, size: int) -> int:
        """Bytes that an instruction reads of its operand `position`, which has `size` bytes."""
        if not size or instruction.op == "dynamic-update-slice" and position == 0:
            return 0
        if instruction.op in {"slice", "dynamic-slice", "gather"} and position == 0:
            return min(size, sum(n for n, _ in instruction.padded))
        if instruction.op == "slice-start":  # returns (operand, slice, ...)
            return min(size, instruction.padded[1][0])
        inside = self.computations.get(instruction.called.get("calls", ""))
        if inside is None:
            return size
        inner = next((i for i in inside.values() if i.op == "parameter" and i.arguments == f"({position})"), None)
        return size if inner is None else min(size, self._read_within(inside, inner.name, size))

    def _read_within(self, inside: dict[str, Instruction], name: str, size: int) -> int:
        """Bytes that the instructions of a fusion read of one of its arrays."""
        total = 0
        for user in inside.values():
            if name in user.operands:
                if self._is_view(user):
                    total += self._read_within(inside, user.name, size)
                elif user.op != "tuple":
                    total += self._read_of(user, user.operands.index(name), size)
        return total

    def _is_view(self, instruction: Instruction) -> bool:
        """Whether the result is an operand with another shape, which is read where the result is."""
        inside = self.computations.get(instruction.called.get("calls", ""))
        if instruction.op != "fusion" or inside is None:
            return instruction.op == "bitcast"
        root = next(i for i in inside.values() if i.is_root)
        return _through_bitcasts(inside, root.name).op == "parameter"

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """The trip count of a `while`, as noted by XLA or, without a note, from its comparison with a constant."""
        if loop.op != "while":
            return None
        if noted := re.search(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)', loop.attributes):
            return int(noted[1])
        condition = self.computations[loop.called["condition"]]
        root = next(i for i in condition.values() if i.is_root)
        if root.op != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition[name] for name in root.operands)
        index = re.search(r"index=(\d+)", counter.attributes)
        start = self._element(computation, loop.operands[0], int(index[1])) if index else None
        if limit.op != "constant" or start is None or start.op != "constant":
            return None
        return int(limit.arguments.strip("()")) - int(start.arguments.strip("()"))

    def _element(self, computation: str, name: str, index: int) -> Instruction | None:
        """The instruction that gives element `index` of a tuple, before copies."""
        instruction = self.computations[computation].get(name)
        if instruction is None or instruction.op != "tuple":
            return None
        element = self.computations[computation][instruction.operands[index]]
        while element.op in {"copy", "bitcast"}:
            element = self.computations[computation][element.operands[0]]
        return element


def collective_bytes(program: Program, within: str | None = None) -> dict[str, int]:
    """Bytes that one device sends in one run of the program with ring algorithms, by kind of collective.

    `within`: of this computation only, such as the body of a loop.

    In a group of g devices these are the bytes of the result times: all-gather (g - 1) / g, reduce-scatter g - 1,
    all-reduce 2 (g - 1) / g, all-to-all (g - 1) / g, collective-permute 1.
    """
    sent: dict[str, int] = dict.fromkeys(COLLECTIVES, 0)
    fusions = {i.called["calls"]: i for c in program.computations.values() for i in c.values() if i.op == "fusion"}
    seen: set[tuple[str, str]] = set()
    for computation, instruction, times in program.executed(within):
        kind = instruction.op.removesuffix("-start")
        if kind not in sent:
            continue
        group, sizes = instruction.group_size, [size for _, size in instruction.arrays]
        size = sum(sizes)
        if instruction.op != kind and kind != "all-reduce":  # an asynchronous start returns (operand, result, ...)
            size = sizes[len(sizes) // 2] if kind != "collective-permute" else sizes[1]
        if fusion := fusions.get(computation):
            if "all-reduce-scatter" in computation:  # the form of a reduce-scatter on TPUs
                kind, size = "reduce-scatter", sum(size for _, size in fusion.arrays)
            # On a TPU, parts of one asynchronous collective may be in several fusions, with the same channel.
            if channel := re.search(r"channel_id=(\d+)", instruction.attributes):
                if (kind, channel[1]) in seen:
                    continue
                seen.add((kind, channel[1]))
        share = 1.0
        if kind != "collective-permute" and group:
            ring = (group - 1) / group
            share = {"all-reduce": 2 * ring, "reduce-scatter": group - 1.0}.get(kind, ring)
        sent[kind] += round(times * size * share)
    return sent


def collective_counts(program: Program, within: str) -> dict[str, int]:
    """The number of collectives in one run of a computation, by kind. Parts of one in different fusions count once."""
    channels: dict[tuple[str, str], int] = {}
    for _, instruction, times in program.executed(within):
        kind = instruction.op.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if kind in COLLECTIVES:
            channels[kind, channel[1] if channel else instruction.name] = times
    return {k: n for k in COLLECTIVES if (n := sum(times for (kind, _), times in channels.items() if kind == k))}


def _parse(line: str) -> Instruction | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _close(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.find("(")
    end = _close(rest, opening)
    return Instruction(start[2], shape, rest[:opening], rest[opening:end], rest[end:], bool(start[1]))


def _elements(shape: str) -> list[str]:
    """The shapes of a tuple's elements."""
    inside, depth, commas = shape[1:-1], 0, [-1]
    for i, character in enumerate(inside):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            commas.append(i)
    return [inside[a + 1 : b].strip() for a, b in itertools.pairwise([*commas, len(inside)])]


def _through_bitcasts(computation: dict[str, Instruction], name: str) -> Instruction:
    instruction = computation[name]
    return _through_bitcasts(computation, instruction.operands[0]) if instruction.op == "bitcast" else instruction


def _close(text: str, opening: int) -> int:
    """The index after the bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    return len(text)
