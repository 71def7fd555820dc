"""Reads what XLA has compiled, for a CPU or a TPU: the text of optimized HLO.

What `Program` finds is what costs memory traffic: arrays that a computation writes out. Within a fusion nothing is.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}
_BITS = {"pred": 8, "bf16": 16}  # the others end with their number of bits: f32, s8, u16
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_SAME_ARRAY = {"bitcast", "copy-start", "copy-done", "async-start", "async-done", "slice-start", "slice-done"}


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
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @cached_property
    def arrays(self) -> list[tuple[str, int]]:
        """(dtype and shape as in "f32[2,3]", bytes) of each array of the result."""
        found = [(dtype, dims) for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.shape)]
        sizes = [math.prod(int(n) for n in dims.split(",") if n) * _bytes(dtype) for dtype, dims in found]
        return [(f"{dtype}[{dims}]", size) for (dtype, dims), size in zip(found, sizes, strict=True)]

    @cached_property
    def called(self) -> dict[str, str]:
        """Computations by role: calls, to_apply, body, condition, branch 0, branch 1, ..."""
        roles = "calls|to_apply|body|condition|true_computation|false_computation"
        named = dict(re.findall(rf"\b({roles})=%?([\w.\-]+)", self.attributes))
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return named | {f"branch {i}": name for i, name in enumerate(names)}

    @property
    def is_prefetch(self) -> bool:
        """Of a TPU: a copy from HBM to the memory beside the processor (S(1)), the one place where arrays are read."""
        return "S(1)" in self.shape and self.op in {
            "copy-start",
            "copy-done",
            "slice-start",
            "slice-done",
            "custom-call",
        }


def _bytes(dtype: str) -> int:
    digits = re.search(r"\d+$", dtype)
    return math.ceil((_BITS.get(dtype) or (int(digits[0]) if digits else 0)) / 8)


class Program:
    """The computations of a module by name, each a dict of instructions by name in the order of execution."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = current = ""
        aliases = re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)", text.partition("\n")[0])
        self._aliased = {f"({number})" for number in aliases}
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line)
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = header[2]
                self.computations[current] = {}
                self.entry = current if header[1] else self.entry
            elif current and (instruction := _parse(line)):
                self.computations[current][instruction.name] = instruction

    @classmethod
    def compiled(cls, lowered: Any) -> "Program":
        """Of what `jax.jit(f).lower(...)` returns."""
        return cls(lowered.compile().as_text())

    def written_out(self, computation: str) -> Iterator[Instruction]:
        """The instructions of a computation and of the loops, branches and calls in it, not those within fusions."""
        for instruction in self.computations[computation].values():
            yield instruction
            if instruction.op in {"while", "conditional", "call"}:
                for name in instruction.called.values():
                    yield from self.written_out(name)

    def loops(self, computation: str | None = None) -> list[Instruction]:
        return [i for i in self.written_out(computation or self.entry) if i.op == "while"]

    def donated(self) -> list[str]:
        """The arguments whose memory the results take over, each as "f32[2,3]"."""
        entry = self.computations[self.entry].values()
        return [i.arrays[0][0] for i in entry if i.op == "parameter" and i.arguments in self._aliased]

    def large_results(self, computation: str, least: int) -> list[Instruction]:
        """What writes an array of at least so many bytes anew: not in place, and not as the one read of a prefetch."""
        return [
            i for i in self.written_out(computation)
            if i.op not in _FREE and not i.is_prefetch
            and any(size >= least and not kept for (_, size), kept in zip(i.arrays, self._in_place(i), strict=True))
        ]  # fmt: skip

    def readers(self, body: str, least: int) -> dict[str, list[Instruction]]:
        """For each array of at least so many bytes that a loop's body is handed: what reads it (passing on is free)."""
        handed = [
            i for i in self.computations[body].values()
            if i.op == "get-tuple-element" and self.computations[body][i.operands[0]].op == "parameter"
            and i.arrays[0][1] >= least
        ]  # fmt: skip
        by_index: dict[str, list[Instruction]] = {}
        for i in handed:  # XLA may take the same element of the tuple several times
            index = re.search(r"index=(\d+)", i.attributes)
            assert index is not None
            by_index.setdefault(f"{index[1]}: {i.arrays[0][0]}", []).extend(self._users(body, i.name))
        return by_index

    def _users(self, body: str, name: str) -> list[Instruction]:
        users = []
        for user in self.computations[body].values():
            if name in user.operands:
                if user.op in _SAME_ARRAY or user.is_prefetch:
                    users += self._users(body, user.name)
                elif user.op != "tuple":
                    users.append(user)
        return list({user.name: user for user in users}.values())

    def multiplies(self, instruction: Instruction) -> bool:
        """Whether it is a matrix product, alone or in a fusion."""
        inside = self.computations.get(instruction.called.get("calls", ""), {}).values()
        return any(i.op in {"dot", "convolution"} for i in (instruction, *inside))

    def is_update(self, instruction: Instruction) -> bool:
        """Whether it writes into an array that it was given."""
        return any(self._in_place(instruction))

    def _in_place(self, instruction: Instruction) -> list[bool]:
        """For each array of the result: whether it is a dynamic-update-slice of one that the instruction was given.

        (Where that array is still needed afterwards, XLA adds a `copy` before.)
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


def _through_bitcasts(computation: dict[str, Instruction], name: str) -> Instruction:
    instruction = computation[name]
    return _through_bitcasts(computation, instruction.operands[0]) if instruction.op == "bitcast" else instruction


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


def _close(text: str, opening: int) -> int:
    """Just past the bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    return len(text)
