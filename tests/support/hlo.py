"""Which weights a compiled program (`parallel/hlo.py`) reads, and by which instructions."""

import re
from typing import Any

from opt_jax.parallel import hlo
from opt_jax.parallel.hlo import Instruction

_SAME_ARRAY = {"bitcast", "copy-start", "copy-done", "async-start", "async-done", "slice-start", "slice-done"}


class Program(hlo.Program):
    def __init__(self, text: str):
        super().__init__(text)
        aliases = re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)", text.partition("\n")[0])
        self._aliased = {f"({number})" for number in aliases}

    @classmethod
    def compiled(cls, lowered: Any) -> "Program":
        """Compile what `jax.jit(f).lower(...)` returns."""
        return cls(lowered.compile().as_text())

    def donated(self) -> list[str]:
        """The arguments whose memory the results reuse, as "f32[2,3]"."""
        entry = self.computations[self.entry].values()
        return [i.arrays[0][0] for i in entry if i.op == "parameter" and i.arguments in self._aliased]

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
                if user.op in _SAME_ARRAY or user.is_prefetch:
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
        return any(self.in_place(instruction))
