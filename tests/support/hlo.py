"""What a compiled program (`parallel/hlo.py`) copies, reads and updates in place.

Arrays that a computation writes to memory cost bandwidth. Those within a fusion are not written to memory.
"""

import re
from collections.abc import Iterator
from typing import Any

from opt_jax.parallel import hlo
from opt_jax.parallel.hlo import Instruction

_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_SAME_ARRAY = {"bitcast", "copy-start", "copy-done", "async-start", "async-done", "slice-start", "slice-done"}


def _is_prefetch(instruction: Instruction) -> bool:
    """Whether it copies from a TPU's HBM to the memory beside the processor, S(1), where arrays are used."""
    copies = {"copy-start", "copy-done", "slice-start", "slice-done", "custom-call"}
    return "S(1)" in instruction.shape and instruction.op in copies


class Program(hlo.Program):
    def __init__(self, text: str):
        super().__init__(text)
        aliases = re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)", text.partition("\n")[0])
        self._aliased = {f"({number})" for number in aliases}

    @classmethod
    def compiled(cls, lowered: Any) -> "Program":
        """Compile what `jax.jit(f).lower(...)` returns."""
        return cls(lowered.compile().as_text())

    def written_out(self, computation: str) -> Iterator[Instruction]:
        """Instructions of a computation, its loops, branches and calls, without those within fusions."""
        for instruction in self.computations[computation].values():
            yield instruction
            if instruction.op in {"while", "conditional", "call"}:
                for name in instruction.called.values():
                    yield from self.written_out(name)

    def loops(self, computation: str | None = None) -> list[Instruction]:
        return [i for i in self.written_out(computation or self.entry) if i.op == "while"]

    def donated(self) -> list[str]:
        """The arguments whose memory the results reuse, as "f32[2,3]"."""
        entry = self.computations[self.entry].values()
        return [i.arrays[0][0] for i in entry if i.op == "parameter" and i.arguments in self._aliased]

    def large_results(self, computation: str, least: int) -> list[Instruction]:
        """Instructions that write a new array of at least `least` bytes: no updates in place, no prefetches."""
        return [
            i
            for i in self.written_out(computation)
            if i.op not in _FREE
            and not _is_prefetch(i)
            and any(size >= least and not kept for (_, size), kept in zip(i.arrays, self._in_place(i), strict=True))
        ]

    def readers(self, body: str, least: int) -> dict[str, list[Instruction]]:
        """For each argument of a loop's body of at least `least` bytes: the instructions that read it."""
        handed = [
            i
            for i in self.computations[body].values()
            if i.op == "get-tuple-element"
            and self.computations[body][i.operands[0]].op == "parameter"
            and i.arrays[0][1] >= least
        ]
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
                if user.op in _SAME_ARRAY or _is_prefetch(user):
                    users += self._users(body, user.name)
                elif user.op != "tuple":
                    users.append(user)
        return list({user.name: user for user in users}.values())

    def multiplies(self, instruction: Instruction) -> bool:
        """Whether the instruction is a matrix product, or a fusion with one."""
        inside = self.computations.get(instruction.called.get("calls", ""), {}).values()
        return any(i.op in {"dot", "convolution"} for i in (instruction, *inside))

    def is_update(self, instruction: Instruction) -> bool:
        """Whether the instruction writes into one of its operands."""
        return any(self._in_place(instruction))

    def _in_place(self, instruction: Instruction) -> list[bool]:
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


def _through_bitcasts(computation: dict[str, Instruction], name: str) -> Instruction:
    instruction = computation[name]
    return _through_bitcasts(computation, instruction.operands[0]) if instruction.op == "bitcast" else instruction
