"""Questions of the tests to a compiled program (`parallel/hlo.py`): what it copies, reads and updates in place.

What `Program` finds is what costs memory traffic: arrays that a computation writes out. Within a fusion nothing is.
"""

import re
from collections.abc import Iterator
from typing import Any

from opt_jax.parallel import hlo
from opt_jax.parallel.hlo import Instruction

_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_SAME_ARRAY = {"bitcast", "copy-start", "copy-done", "async-start", "async-done", "slice-start", "slice-done"}


def _is_prefetch(instruction: Instruction) -> bool:
    """Of a TPU: a copy from HBM to the memory beside the processor (S(1)), the one place where arrays are read."""
    copies = {"copy-start", "copy-done", "slice-start", "slice-done", "custom-call"}
    return "S(1)" in instruction.shape and instruction.op in copies


class Program(hlo.Program):
    def __init__(self, text: str):
        super().__init__(text)
        aliases = re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)", text.partition("\n")[0])
        self._aliased = {f"({number})" for number in aliases}

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
            i
            for i in self.written_out(computation)
            if i.op not in _FREE
            and not _is_prefetch(i)
            and any(size >= least and not kept for (_, size), kept in zip(i.arrays, self._in_place(i), strict=True))
        ]

    def readers(self, body: str, least: int) -> dict[str, list[Instruction]]:
        """For each array of at least so many bytes that a loop's body is handed: what reads it (passing on is free)."""
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
