"""Reads the pickles of torch files safely: an interpreter of the few instructions that they need.

An allow-list of globals alone does not make Python's own unpickler safe: it allocates the memory that an instruction
asks for (a memo index of 4 billion), hashes keys that are made to collide, and applies BUILD to any object. This
interpreter imports nothing and calls only the functions that the caller passes. Its time and memory are proportional to
the length of the pickle. It knows those instructions of protocols 2 to 5 (pickletools.py) that `torch.save` writes for
dictionaries, lists, tensors and plain objects.
"""

import gc
import pickletools
import struct
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

_MAX_INSTRUCTIONS = 10_000_000  # 1500 tensors take 48 thousand; the most expensive instruction makes a 64-byte dict
_MAX_KEY = 1 << 60  # Python hashes larger integers modulo 2^61 - 1, so keys could be made to collide
_MAX_ARGUMENTS = 16  # of a function: each call copies its arguments, and a pickle can use one tuple many times
_LITERALS = frozenset(
    (
        "INT",
        "BININT",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BINSTRING",
        "SHORT_BINSTRING",
    )
)
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
# Three of four instructions of a pickle are these. `_Machine` decodes them itself; pickletools takes ten times as long.
_LONG_BINPUT, _BINGET, _LONG_BINGET, _BININT1, _TUPLE1, _BINUNICODE, _MARK, _STOP = b"rhjK\x85X(."
_uint32 = struct.Struct("<I").unpack_from


class Refused(ValueError):
    """The pickle asks for a global that is not allowed. The message is the global's name."""


class StubClass(NamedTuple):
    """Stands for a foreign class, which is never imported. `name` is its module and name. An instance is a `Stub`."""

    name: str


class Stub:
    """Stands for an object of a foreign class: the content of the pickle as plain data.

    Attributes:
      name: module and class.
      args: the arguments that it is created with.
      state: its state, usually a dict, or None.
      items: the items that it holds as a container: values, or pairs of key and value.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple) -> None:
        self.name, self.args, self.state, self.items = name, args, None, []


def loads(data: bytes, find_global: Callable[[str], Any], floats: list[int] | None = None) -> Any:
    """The object in a pickle. An OrderedDict becomes a dict, and a persistent id stands for the object that it names.

    Args:
      data: the pickle.
      find_global: "module.name" -> its replacement: a `StubClass`, plain data, or a function for REDUCE to call.
      floats: gets the position of each float, for `differ_in_floats`.

    Raises:
      ValueError: damaged, or not a pickle as torch.save writes it; or as `find_global` and its functions raise it.
    """
    # A collection would look at all objects that the pickle makes, again and again, and these took half of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _Machine(find_global, [] if floats is None else floats).run(data)
    finally:
        if enabled:
            gc.enable()


def differ_in_floats(a: bytes, b: bytes, floats: Sequence[int]) -> bool:
    """Whether two pickles are equal, but for the values of floats. Then the same instructions make both objects.

    floats: the positions of the floats in `a`, from `loads`.
    """
    if len(a) != len(b):
        return False
    different = np.flatnonzero(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8))
    values = np.array(floats, np.int64)[:, None] + np.arange(8)
    return bool(np.isin(different, values).all())


class _Machine:
    def __init__(self, find_global: Callable[[str], Any], floats: list[int]) -> None:
        self.find_global, self.floats = find_global, floats
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: dict[int, Any] = {}
        instructions: dict[str, Callable[[], None]] = {
            "POP": self._pop,
            "POP_MARK": lambda: self._push_on_mark(),
            "EMPTY_TUPLE": lambda: self.stack.append(()),
            "EMPTY_LIST": lambda: self.stack.append([]),
            "EMPTY_DICT": lambda: self.stack.append({}),
            "TUPLE": lambda: self._push_on_mark(tuple(self.stack)),
            "TUPLE2": lambda: self._tuple(2),
            "TUPLE3": lambda: self._tuple(3),
            "APPEND": lambda: self._extend([self.stack.pop()]),
            "APPENDS": lambda: self._extend(self._to_mark()),
            "SETITEM": lambda: self._update([self.stack.pop(), self.stack.pop()][::-1]),
            "SETITEMS": lambda: self._update(self._to_mark()),
            "MEMOIZE": self._memoize,
            "STACK_GLOBAL": self._stack_global,
            "BINPERSID": lambda: self.stack.append(self.stack.pop()),
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "BUILD": self._build,
            "NONE": lambda: self.stack.append(None),
            "NEWTRUE": lambda: self.stack.append(True),
            "NEWFALSE": lambda: self.stack.append(False),
        }
        self.handlers = [instructions.get(_OPCODES[i].name) if i in _OPCODES else None for i in range(256)]

    def run(self, data: bytes) -> Any:
        try:
            self._run(data)
        except (IndexError, KeyError, struct.error):
            raise ValueError("it ends too early, or an instruction lacks the objects it works on") from None
        if len(self.stack) != 1 or self.below:
            raise ValueError("it does not make one object")
        return self.stack[0]

    def _run(self, data: bytes) -> None:
        at, file, memo, handlers, stack = 0, BytesIO(data), self.memo, self.handlers, self.stack
        for _ in range(_MAX_INSTRUCTIONS):
            code = data[at]
            at += 1
            if code == _LONG_BINPUT:
                memo[_uint32(data, at)[0]] = stack[-1]
                at += 4
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _LONG_BINGET:
                stack.append(memo[_uint32(data, at)[0]])
                at += 4
            elif code == _BININT1:
                stack.append(data[at])
                at += 1
            elif code == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif code == _BINUNICODE:
                start, at = at + 4, at + 4 + _uint32(data, at)[0]
                if at > len(data):
                    raise ValueError("it ends within a text")
                stack.append(str(data[start:at], "utf-8", "surrogatepass"))
            elif code == _MARK:
                self.below.append(stack)
                stack = self.stack = []
            elif (handler := handlers[code]) is not None:
                handler()
                stack = self.stack
            elif code == _STOP:
                return
            else:
                at = self._other(code, file, at)
        raise ValueError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")

    def _other(self, code: int, file: BytesIO, at: int) -> int:
        """Run one of the rarer instructions, whose argument starts at `at`. Returns where the next one starts."""
        if (opcode := _OPCODES.get(code)) is None:
            raise ValueError(f"it has an unknown instruction, {code}")
        file.seek(at)
        argument: Any = None if opcode.arg is None else opcode.arg.reader(file)
        name = opcode.name
        if name == "BINFLOAT":
            self.floats.append(at)
        if name in _LITERALS:
            self.stack.append(argument)
        elif name == "BINPUT":
            self.memo[argument] = self.stack[-1]
        elif name == "GLOBAL":
            self._global(argument)
        elif name == "INST":
            self._global(argument)  # names what it asks for
            raise ValueError("it has the instruction INST, which torch.save does not write")
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the instruction {name}, which torch.save does not write")
        return file.tell()

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _push_on_mark(self, *objects) -> None:
        self._to_mark()
        self.stack.extend(objects)

    def _pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._to_mark()

    def _tuple(self, n: int) -> None:
        items = tuple(self.stack[-n:])
        del self.stack[-n:]
        if len(items) < n:
            raise IndexError
        self.stack.append(items)

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise ValueError(f"it appends to a {type(target).__name__}")

    def _update(self, pairs: list[Any]) -> None:
        target, keys, values = self.stack[-1], pairs[::2], pairs[1::2]
        if len(keys) != len(values) or not isinstance(target, (dict, Stub)):
            raise ValueError(f"it puts {len(pairs)} keys and values into a {type(target).__name__}")
        for key, value in zip(keys, values, strict=True):
            if isinstance(target, Stub):
                target.items.append((key, value))
            elif isinstance(key, (str, bytes, Stub, type(None))) or isinstance(key, int) and abs(key) < _MAX_KEY:
                target[key] = value
            else:
                raise ValueError(f"a dictionary has a {type(key).__name__} as key, which is not supported")

    def _global(self, argument: str) -> None:
        self.stack.append(self.find_global(argument.replace(" ", ".", 1)))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("the name of a global is not a string")
        self.stack.append(self.find_global(f"{module}.{name}"))

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is tuple and isinstance(function, StubClass):
            self.stack.append(Stub(function.name, arguments))
        elif type(arguments) is tuple and callable(function) and len(arguments) <= _MAX_ARGUMENTS:
            self.stack.append(function(*arguments))
        else:
            raise ValueError(f"it calls a {type(function).__name__} with a {type(arguments).__name__}")

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif not isinstance(target, dict):  # attributes of an OrderedDict: the `_metadata` of a state dict
            raise ValueError(f"it changes a {type(target).__name__}")
