"""Reads the pickles of torch files safely: an interpreter of the few instructions that they need.

An allow-list of globals alone does not make Python's own unpickler safe: it allocates the memory that an instruction
asks for (a memo index of 4 billion), hashes keys that are made to collide, and applies BUILD to any object. This
interpreter imports nothing and calls only the functions that the caller passes. Its time and memory are proportional to
the length of the pickle. It knows those instructions of protocols 2 to 5 (pickletools.py) that `torch.save` writes for
dictionaries, lists, tensors and plain objects.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

_MAX_INSTRUCTIONS = 10_000_000  # 1500 tensors take 48 thousand; the most expensive instruction makes a 64-byte dict
_MAX_KEY = 1 << 60  # Python hashes larger integers modulo 2^61 - 1, so keys could be made to collide
_MAX_ARGUMENTS = 16  # of a function: each call copies its arguments, and a pickle can use one tuple many times
_LITERALS = frozenset(
    (
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BINSTRING",
        "SHORT_BINSTRING",
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


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


def loads(data: bytes, find_global: Callable[[str], Any]) -> Any:
    """The object in a pickle. An OrderedDict becomes a dict, and a persistent id stands for the object that it names.

    Args:
      data: the pickle.
      find_global: "module.name" -> its replacement: a `StubClass`, plain data, or a function for REDUCE to call.

    Raises:
      ValueError: damaged, or not a pickle as torch.save writes it; or as `find_global` and its functions raise it.
    """
    return _Machine(find_global).run(data)


class _Machine:
    def __init__(self, find_global: Callable[[str], Any]) -> None:
        self.find_global = find_global
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: dict[int, Any] = {}
        self.instructions: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "MARK": self._mark,
            "POP": self._pop,
            "POP_MARK": lambda _: self._push_on_mark(),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "TUPLE": lambda _: self._push_on_mark(tuple(self.stack)),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._update([self.stack.pop(), self.stack.pop()][::-1]),
            "SETITEMS": lambda _: self._update(self._to_mark()),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            "BINGET": lambda i: self.stack.append(self.memo[i]),
            "LONG_BINGET": lambda i: self.stack.append(self.memo[i]),
            "GLOBAL": self._global,
            "INST": self._inst,
            "STACK_GLOBAL": self._stack_global,
            "BINPERSID": lambda _: self.stack.append(self.stack.pop()),
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "BUILD": self._build,
        }

    def run(self, data: bytes) -> Any:
        try:
            for count, (code, argument, _) in enumerate(pickletools.genops(data)):
                name = code.name
                if name in _LITERALS:
                    self.stack.append(argument)
                elif name in self.instructions:
                    self.instructions[name](argument)
                elif name in _CONSTANTS:
                    self.stack.append(_CONSTANTS[name])
                elif name != "STOP":
                    raise ValueError(f"it has the instruction {name}, which torch.save does not write")
                if count == _MAX_INSTRUCTIONS:
                    raise ValueError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
        except (IndexError, KeyError):
            raise ValueError("an instruction lacks the objects it works on") from None
        if len(self.stack) != 1 or self.below:
            raise ValueError("it does not make one object")
        return self.stack[0]

    def _mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _push_on_mark(self, *objects) -> None:
        self._to_mark()
        self.stack.extend(objects)

    def _pop(self, _) -> None:
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

    def _put(self, i: int) -> None:
        self.memo[i] = self.stack[-1]

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

    def _inst(self, argument: str) -> None:
        self._global(argument)  # names what it asks for
        raise ValueError("it has the instruction INST, which torch.save does not write")

    def _stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("the name of a global is not a string")
        self.stack.append(self.find_global(f"{module}.{name}"))

    def _call(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is tuple and isinstance(function, StubClass):
            self.stack.append(Stub(function.name, arguments))
        elif type(arguments) is tuple and callable(function) and len(arguments) <= _MAX_ARGUMENTS:
            self.stack.append(function(*arguments))
        else:
            raise ValueError(f"it calls a {type(function).__name__} with a {type(arguments).__name__}")

    def _build(self, _) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif not isinstance(target, dict):  # attributes of an OrderedDict: the `_metadata` of a state dict
            raise ValueError(f"it changes a {type(target).__name__}")
