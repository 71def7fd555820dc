"""Malicious pickles in torch files: malformed tensors, bombs, and code. Not a test itself."""

import pickletools
import random
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import metaseq_files
from support.hf_files import global_, tensor_pickle, torch_zip
from support.hostile_files import CONFIG, EITHER, EMBED, FC1, HARMLESS, REFUSED, Case, flip


def zipped(data_pkl: bytes, storages: dict[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x"
        torch_zip(path, data_pkl, storages)
        return path.read_bytes()


def text(string: str | bytes) -> bytes:
    raw = string.encode() if isinstance(string, str) else string
    return b"X" + struct.pack("<I", len(raw)) + raw


@dataclass(frozen=True)
class StateDict:
    """The entries of a state dict in pickle opcodes, and its storages."""

    entries: dict[str, bytes]
    storages: dict[str, bytes]

    def pickled(self, entry: bytes = b"", after: bytes = b"") -> bytes:
        """The pickle, with `entry` as the value of FC1 and `after` before its end."""
        entries = self.entries | {FC1: entry} if entry else self.entries
        items = b"".join(text(name) + value for name, value in entries.items())
        return b"\x80\x02" + global_("collections OrderedDict") + b")R(" + items + b"u" + after + b"."

    def file(self, entry: bytes = b"", after: bytes = b"") -> bytes:
        return zipped(self.pickled(entry, after), self.storages)


def tensor_cases(state: StateDict) -> Iterator[Case]:
    def case(label: str, entry: bytes, *says: str, outcome: str = REFUSED) -> Case:
        return Case(f"tensor/{label}", "bin", {"pytorch_model.bin": state.file(entry)}, outcome, (FC1, *says))

    for i, (numel, offset, shape, strides) in enumerate((
        (128, 0, (8, 16), None), (128, 0, (16, 9), (8, 1)), (128, 1, (16, 8), None), (128, 0, (16, 8), (9, 1)),
        (128, -1, (16, 8), None),
        (128, 0, (-16, -8), None), (128, 0, (16, 8), (-8, -1)), (128, 0, (16, 8), (8,)), (128, 0, (16, 8), (8, 1, 1)),
        (128, 2**63, (16, 8), None),
        (128, 0, (16, 8), (2**62, 2**62)), (127, 0, (16, 8), None), (129, 0, (16, 8), None), (0, 0, (16, 8), None),
        (-128, 0, (16, 8), None),
        (2**62, 0, (16, 8), None), (10**30, 0, (16, 8), None), (128, 0, (10**12,), (0,)),
        (128, 0, (2**40, 2**40), (0, 0)), (128, 0, (10**30,), (0,)),
        (128, 0, (0, 10**30), (1, 1)), (128, 0, (0, 2**62, 2**62), (0, 0, 0)), (128, 0, (1,) * 100, None),
        (128, 0, (), None), (128, 0, (128,), None),
        (128, 0, (1, 16, 8), None), (128, 128, (16, 8), None), (128, 0, (0, 8), None), (128, 10**400, (16, 8), None),
        (128, 0, (1, 1), (2**62, 2**62)),
    )):  # fmt: skip
        yield case(f"numbers{i}", tensor_pickle(FC1, "float32", numel, offset, shape, strides))
    yield case("wrong-dtype", tensor_pickle(FC1, "float16", 128, 0, (16, 8)), "bytes")
    for key in (
        "",
        "x",
        "../data.pkl",
        "../../x",
        "/etc/passwd",
        "\x1b[31m",
        "x" * 100_000,
        "archive/data/" + FC1,
        ".",
    ):
        yield case(f"key{key[:12]!r}", tensor_pickle(key, "float32", 128, 0, (16, 8)), "record data/")
    rebuild, storage = global_("torch._utils _rebuild_tensor_v2"), global_("torch FloatStorage")
    ints = b"(K\x10K\x08t(K\x08K\x01t"
    pid = b"(" + text("storage") + storage + text(FC1) + text("cpu") + b"K\x80tQ"
    malformed = {
        "fine": rebuild + b"(" + pid + b"K\0" + ints + b"\x89}tR",
        "no-arguments": rebuild + b")R",
        "too-many": rebuild + b"(" + b"N" * 8 + b"tR",
        "far-too-many": rebuild + b"(" + b"N" * 100_000 + b"tR",
        "nones": rebuild + b"(NNNNNNtR",
        "storage-is-a-string": rebuild + b"(" + text("storage") + b"K\0" + ints + b"\x89}tR",
        "storage-is-a-list": rebuild + b"(]K\0" + ints + b"\x89}tR",
        "storage-of-strings": rebuild + b"((" + text("storage") * 5 + b"tQK\0" + ints + b"\x89}tR",
        "other-kind": rebuild + b"(" + pid.replace(text("storage"), text("module")) + b"K\0" + ints + b"\x89}tR",
        "key-is-a-number": rebuild + b"(" + pid.replace(text(FC1), b"K\0") + b"K\0" + ints + b"\x89}tR",
        "size-is-a-string": rebuild + b"(" + pid + b"K\0" + text("ab") + b"(K\x08K\x01t\x89}tR",
        "size-is-a-dict": rebuild + b"(" + pid + b"K\0}(K\x08K\x01t\x89}tR",
        "size-of-floats": rebuild + b"(" + pid + b"K\0(G" + bytes(8) + b"K\x08t(K\x08K\x01t\x89}tR",
        "size-of-booleans": rebuild + b"(" + pid + b"K\0\x88\x88\x86(K\x08K\x01t\x89}tR",
        "endless-size": rebuild + b"(" + pid + b"K\0(" + b"K\1" * 50_000 + b"t(" + b"K\1" * 50_000 + b"t\x89}tR",
        "parameter-of-nothing": global_("torch._utils _rebuild_parameter") + b"(N\x88}tR",
        "parameter-of-a-parameter": global_("torch._utils _rebuild_parameter") + b"(" + rebuild + b"\x88}tR",
        "parameter-without-arguments": global_("torch._utils _rebuild_parameter") + b")R",
        "size": global_("torch Size") + b"(K\1K\2t\x85R",
        "size-of-a-string": global_("torch Size") + text("ab") + b"\x85R",
        "size-of-nothing": global_("torch Size") + b")R",
        "storage": pid,
        "storage-class": storage,
        "function": rebuild,
        "storage-is-called": storage + b"(K\5tR",
        "number": b"K\5", "none": b"N", "text": text("x"), "list": b"]", "dict": b"}", "tuple": b")",
        "truth": b"\x88",
        "deep-list": b"]" * 20_000 + b"a" * 19_999, "deep-tuple": b")" + b"\x85" * 50_000,
        "doubling-tuples": b")" + b"q\0h\0\x86" * 60, "doubling-lists": b"]" + b"2\x86" * 60,
        "doubling-by-memo": b")" + b"".join(b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I",
        i) + b"\x86" for i in range(60)),
        "doubling-dict": b"}" + b"".join(b"r" + struct.pack("<I", i) + b"0}(" + text("a") + b"j" + struct.pack("<I",
        i) + text("b")
                                         + b"j" + struct.pack("<I", i) + b"u" for i in range(60)),
        "dict-with-itself": b"}q\1" + text("x") + b"h\1s", "list-with-itself": b"]q\1h\1a",
    }  # fmt: skip
    for label, entry in malformed.items():
        changes = {"pytorch_model.bin": state.file(entry)}
        yield Case(f"tensor/{label}", "bin", changes, HARMLESS if label == "fine" else REFUSED, ("pytorch_model.bin",))
    # Keys whose hash would take 2**60 steps, that are no strings, or that all collide.
    doubling = b")" + b"".join(b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + b"\x86" for i in range(60))
    collide = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(20_000))
    for label, pairs in {"doubling": doubling + b"N", "tuple": b")N", "list": b"]N", "number": b"K\1N", "none": b"NN",
    "bytes": b"C\1xN",
                         "float": b"G" + bytes(8) + b"N", "dict": b"}N", "collisions": collide,
                         "odd": b"N"}.items():  # fmt: skip
        changes = {"pytorch_model.bin": state.file(after=b"(" + pairs + b"u")}
        yield Case(f"tensor/key-{label}", "bin", changes, REFUSED, ("pytorch_model.bin",))
    shared = state.storages | {"all": state.storages[EMBED] + state.storages[FC1]}
    entry = tensor_pickle("all", "float32", 512, 384, (16, 8))
    changes: dict[str, bytes | None | Path] = {"pytorch_model.bin": zipped(state.pickled(entry), shared)}
    yield Case("tensor/shared-storage-is-fine", "bin", changes, HARMLESS)


def bomb_cases(state: StateDict) -> Iterator[Case]:
    """Small files that would take much memory or time, and instructions that no torch file has."""
    big = (
        struct.pack("<I", 2**31),
        struct.pack("<I", 2**32 - 1),
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 2**62),
    )
    struct.pack("<Q", 2**64 - 1)
    bombs = {
        "memo0": b"Nr" + big[0], "memo1": b"Nr" + big[1], "memo-text": b"Np4294967295\n",
        "memo-text2": b"Np" + b"9" * 5000 + b"\n",
        "memo-negative": b"Np-1\n", "get0": b"j" + big[0], "get1": b"h\xff", "get-text": b"g99999999999\n",
        "unicode": b"X" + big[1] + b"x",
        "bytes": b"B" + big[1] + b"x", "long4": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "long4-negative": b"\x8b" + struct.pack("<i", -1),
        "long1": b"\x8a\xff" + b"\x7f" * 255, "int": b"I" + b"9" * 100_000 + b"\n",
        "long": b"L" + b"9" * 100_000 + b"L\n",
        "float": b"F" + b"9" * 100_000 + b"\n", "string": b"T" + struct.pack("<i", 2**31 - 1),
        "string-negative": b"T" + struct.pack("<i", -1),
        "marks": b"(" * 100_000, "marks-and-pops": b"(" * 100_000 + b"1" * 100_000 + b"N", "pops": b"0" * 1000,
        "tuples": b"\x87\x87\x87",
        "dup": b"N2" * 1000, "nothing": b"}b", "append": b"a", "appends": b"e", "setitem": b"s", "setitems": b"u",
        "reduce": b"R",
        "persid": b"Pstorage\n", "binpersid": b"Q" * 100, "unknown": b"\xff", "nul": b"\0", "stop": b"N.",
        "proto": b"\x80\x09N", "next-buffer": b"\x97",
        "readonly": b"N\x98", "sets": b"\x8f(K\1\x90", "frozenset": b"(K\1\x91",
    }  # fmt: skip
    for i, size in enumerate(big[2:]):
        bombs |= {f"unicode8-{i}": b"\x8d" + size + b"x", f"bytes8-{i}": b"\x8e" + size + b"x",
        f"bytearray8-{i}": b"\x96" + size + b"x",
                  f"frame-{i}": b"\x95" + size + b"N"}  # fmt: skip
    for label, entry in bombs.items():
        yield Case(f"bomb/{label}", "bin", {"pytorch_model.bin": state.file(entry)}, REFUSED, ("pytorch_model.bin",))
    pickled = state.pickled()
    rng = random.Random(3)
    for i in range(60):  # flips without a checksum that would notice them
        flipped = flip(pickled, rng.randrange(len(pickled) * 8))
        file = zipped(flipped, state.storages).replace(struct.pack("<I", zlib.crc32(flipped)), bytes(4))
        yield Case(f"bomb/pickle-bit{i}", "bin", {"pytorch_model.bin": file}, EITHER)
    for i in range(20):
        cut = pickled[: rng.randrange(len(pickled))]
        yield Case(
            f"bomb/pickle-cut{i}",
            "bin",
            {"pytorch_model.bin": zipped(cut, state.storages)},
            REFUSED,
            ("pytorch_model.bin",),
        )
    ends = sorted(
        p or 0 for op, _, p in pickletools.genops(pickled) if op.name in ("REDUCE", "BINPERSID", "TUPLE", "MARK")
    )
    for i, at in enumerate(rng.sample(ends, 20)):
        dropped = pickled[:at] + pickled[at + 1 :]
        yield Case(f"bomb/pickle-without{i}", "bin", {"pytorch_model.bin": zipped(dropped, state.storages)}, EITHER)


# Code ---------------------------------------------------------------------------------------------------------------

COMMAND = "touch CANARY"
GLOBALS = (
    "os system", "posix system", "nt system", "os popen", "os execv", "subprocess Popen", "subprocess check_output",
    "builtins eval", "builtins exec",
    "builtins __import__", "builtins getattr", "builtins compile", "builtins open", "__builtin__ eval",
    "__builtin__ file", "pty spawn", "runpy _run_code",
    "importlib import_module", "timeit timeit", "pdb run", "code interact", "types FunctionType", "types CodeType",
    "marshal loads", "pickle loads",
    "_pickle loads", "copyreg _reconstructor", "copyreg __newobj__", "copyreg add_extension",
    "copy_reg _reconstructor", "functools partial",
    "functools reduce", "operator attrgetter", "operator methodcaller", "ctypes CDLL", "shutil rmtree",
    "webbrowser open", "socket create_connection",
    "multiprocessing.process Process", "threading Thread", "logging.config dictConfig", "cProfile run",
    "doctest testfile", "idlelib.run main",
    "torch load", "torch.serialization load", "torch.storage _load_from_bytes", "torch.hub load", "torch.jit load",
    "torch.jit._script unpickle",
    "torch.fx._symbolic_trace _Patcher", "torch.package PackageImporter", "torch.utils._config_module load_config",
    "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter_with_state", "torch.nn.modules.linear Linear",
    "torch UntypedStorage",
    "numpy load", "numpy.core.multiarray _reconstruct", "numpy.testing._private.utils runstring",
    "numpy.f2py.crackfortran getlincoef",
    "joblib load", "dill._dill _create_function", "cloudpickle.cloudpickle _make_function", "transformers AutoModel",
    "pip main", "site addsitedir",
    "argparse Namespace", "omegaconf.dictconfig DictConfig", "collections OrderedDict.fromkeys",
    "collections OrderedDict.__class__", "collections namedtuple",
    "torch Size.__new__", "torch FloatStorage.__init__.__globals__", "torch._utils _rebuild_tensor_v2.__globals__",
    "torch ", " Size", " ",
    "opt_jax.checkpoints.formats.mapped_files map_file", "opt_jax.checkpoints.formats.unpickle loads",
    "opt_jax.checkpoints.hub resolve", "__main__ main", "sys modules",
    "os\x00 system", "\x1b[31mos system",
    "OS SYSTEM", "x" * 10_000 + " y", "..os system", "os.path os.system", "torch._utils _rebuild_tensor",
    "torch._tensor _rebuild_from_type_v2",
)  # fmt: skip


def code_cases(state: StateDict) -> Iterator[Case]:
    """Pickles with which Python's unpickler would run a command. A few name globals that do not exist."""

    def case(label: str, entry: bytes, *says: str, after: bytes = b"") -> Case:
        changes: dict[str, bytes | None | Path] = {"pytorch_model.bin": state.file(entry, after)}
        return Case(f"code/{label}", "bin", changes, REFUSED, ("pytorch_model.bin", *says))

    def stack_global(name: str) -> bytes:
        module, _, attribute = name.partition(" ")
        return text(module) + text(attribute) + b"\x93"

    command = b"(" + text(COMMAND) + b"t"
    for name in GLOBALS:
        says = (f"asks for {name.replace(' ', '.', 1)}",) if len(name) < 100 and name.isprintable() else ("asks for",)
        yield case(f"global {name[:40]!r}", global_(name) + command + b"R", *says)
        yield case(f"stack_global {name[:40]!r}", stack_global(name) + command + b"R", *says)
    system = global_("os system")
    ordered, size, storage = (global_(name) for name in ("collections OrderedDict", "torch Size", "torch FloatStorage"))
    inner = b"\x80\x02" + system + command + b"R."
    disguises: dict[str, bytes] = {
        "inst": b"(" + text(COMMAND) + b"ios\nsystem\n",
        "obj": b"(" + system + text(COMMAND) + b"o",
        "newobj": system + command + b"\x81",
        "newobj_ex": system + command + b"}\x92",
        "allowed-newobj_ex": ordered + command + b"}\x92",
        "obj-of-allowed": b"(" + ordered + text(COMMAND) + b"o",
        "inst-of-allowed": b"(icollections\nOrderedDict\n",
        "ext1": b"\x82\x01" + command + b"R", "ext2": b"\x83\x01\x02" + command + b"R",
        "ext4": b"\x84\1\0\0\0" + command + b"R",
        "getattr": global_("builtins getattr") + b"(" + global_("os path") + text("system") + b"tR" + command + b"R",
        "reduce-of-a-string": text("os.system") + command + b"R",
        "reduce-of-a-dtype": global_("torch FloatStorage") + command + b"R",
        "reduce-of-a-dict": b"}" + command + b"R",
        "reduce-of-a-result": ordered + b")R" + command + b"R",
        "reduce-with-a-list": size + b"]" + b"R",
        "setstate": ordered + b")R}" + text("__setstate__") + system + b"sb" + text(COMMAND) + b"b",
        "reduce-attribute": ordered + b")R}" + text("__reduce__") + system + b"sb",
        "class-attribute": ordered + b")R}" + text("__class__") + system + b"sb",
        "build-on-a-function": size + b"}" + text("__code__") + text("x") + b"sb",
        "build-on-a-function-with-slots": size + b"N}" + text("__defaults__") + b")s\x86b",
        "build-on-a-string": global_("torch FloatStorage") + b"}" + text("__doc__") + text("x") + b"sb",
        "build-on-a-tuple": b")}" + text("x") + text("x") + b"sb",
        "build-on-a-tensor": state.entries[FC1] + b"}" + text("storage") + text("x") + b"sb",
        "hooks": state.entries[FC1][:-2] + system + command + b"R" + b"tR",
        "metadata-of-a-tensor": state.entries[FC1][:-2] + b"}" + text("x") + system + command + b"RstR",
        "persistent-id": b"(" + text("storage") + system + text("0") + text("cpu") + b"K\1tQ",
        "persistent-id-is-code": system + command + b"RQ",
        "location-is-code": b"(" + text("storage") + storage + text(FC1) + system + command + b"RK\1tQ",
        "nested-pickle": global_("torch.storage _load_from_bytes") + b"B" + struct.pack("<I",
        len(inner)) + inner + b"\x85R",
        "nested-pickle-loads": global_("pickle loads") + b"C" + bytes([len(inner)]) + inner + b"\x85R",
        "pickle-behind-the-end": b"N." + inner,
        "partial": global_("functools partial") + b"(" + system + text(COMMAND) + b"tR)R",
        "memo-alias": text("os") + b"q\7" + text("system") + b"q\x080" + b"0h\7h\x08\x93" + command + b"R",
        "alias-of-a-name": text("collections") + text("OrderedDict") + b"q\x08\x93q\x0800h\x08" + command + b"R",
        "stack-global-of-tuples": text("os") + b"\x85" + text("system") + b"\x85\x93",
        "stack-global-of-globals": storage + storage + b"\x93" + command + b"R",
        "dup": system + b"2" + command + b"R",
        "popped": system + command + b"R0N",
        "popped-mark": b"(" + system + command + b"R1N",
        "key": b"}" + system + command + b"RNs",
        "parameter": global_("torch._utils _rebuild_parameter") + b"(" + system + command + b"R\x88}tR",
        "size-of-code": size + b"(" + system + command + b"Rt\x85R",
        "unicode-opcode": b"Vos\nVsystem\n\x93" + command + b"R",
        "string-opcode": b"S'os'\nS'system'\n\x93" + command + b"R",
        "short-strings": b"U\2osU\6system\x93" + command + b"R",
        "in-a-frame": b"\x95" + struct.pack("<Q", 11) + system + command + b"R",
        "proto-twice": b"\x80\x04" + system + command + b"R",
        "proto-0": b"cos\nsystem\n(S'" + COMMAND.encode() + b"'\ntR",
        "homoglyph": text("torch._ut\u0456ls") + text("_rebuild_tensor_v2") + b"\x93" + command + b"R",
        "trailing-space": global_("collections OrderedDict ") + b")R",
        "carriage-return": b"ccollections\r\nOrderedDict\r\n)R",
    }  # fmt: skip
    for label, entry in disguises.items():
        yield case(label, entry)
    yield case("after-the-state-dict", b"", after=b"0" + system + command + b"R")
    yield case("setstate-of-the-state-dict", b"", after=b"}" + text("__setstate__") + system + b"sb")
    changes: dict[str, bytes | None | Path] = {"pytorch_model.bin": b"\x80\x02" + system + command + b"R."}
    yield Case("code/plain-pickle", "bin", changes, REFUSED, ("pytorch_model.bin",))
    changes = {"pytorch_model.bin": zipped(state.pickled(), state.storages | {"../code/__torch__.py": b"import os"})}
    yield Case("code/torchscript-record", "bin", changes, EITHER)


def state_dict(weights) -> StateDict:
    entries = {name: tensor_pickle(name, a.dtype.name, a.size, 0, a.shape) for name, a in weights.items()}
    return StateDict(entries, {name: a.tobytes() for name, a in weights.items()})


# metaseq ------------------------------------------------------------------------------------------------------------


def metaseq_contents(weights) -> dict[str, dict]:
    cfg = metaseq_files.omega({"model": metaseq_files.settings(CONFIG)})
    return metaseq_files.contents(weights, parts=2, shards=2, flat=True, cfg=cfg)


def metaseq_cases(weights) -> Iterator[Case]:
    """Attacks on the stubs for foreign objects, which only metaseq's files may have. False settings and metadata."""
    name = "reshard-model_part-1-shard0.pt"

    def case(label: str, opcodes: bytes = b"", outcome: str = EITHER, **entries) -> Case:
        storages: dict[str, bytes] = {}
        content = metaseq_contents(weights)[name]
        content |= {key: change(content[key]) for key, change in entries.items()}
        pickled = metaseq_files.encode(content, storages)
        file = zipped(b"\x80\x02" + pickled[:-1] + (text("extra") + opcodes if opcodes else b"") + b"u.", storages)
        return Case(f"metaseq/{label}", "metaseq", {name: file}, outcome, (name,) if outcome == REFUSED else ())

    command = b"(" + text(COMMAND) + b"t"
    stubs = (
        "argparse Namespace",
        "enum Enum",
        "typing Any",
        "builtins getattr",
        "omegaconf os.system",
        "metaseq.x y.__class__",
    )
    for wanted in (*GLOBALS, *stubs):
        yield case(
            f"global {wanted[:40]!r}", global_(wanted) + command + b"R}" + text("__setstate__") + text("x") + b"sb"
        )
    for wanted in (
        "os system",
        "builtins eval",
        "builtins getattr",
        "torch.storage _load_from_bytes",
        "functools partial",
    ):
        yield case(f"refused {wanted}", global_(wanted) + command + b"R", REFUSED)
    stub, system = global_("omegaconf.x Y"), global_("os system")
    for label, opcodes in {
        "stub-is-called-twice": stub + b")R" + command + b"R",
        "stub-called-with-code": stub + b"(" + system + command + b"RtR",
        "class-is-built": stub + b"}" + text("name") + text("os") + b"sb",
        "state-is-code": stub + b")R" + system + command + b"Rb",
        "reduce": stub + b")R}" + text("__reduce__") + system + b"sb",
        "slots": stub + b")RN}" + text("args") + system + b"s\x86b",
    }.items():  # fmt: skip
        yield case(label, opcodes, REFUSED)
    memo = [b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) for i in range(60)]
    doubling = b")" + b"".join(m + b"\x86" for m in memo)
    for label, opcodes in {
        "doubling": doubling, "deep-stubs": (stub + b"(") * 20_000 + b"tR" * 20_000,
        "deep-state": (stub + b")R") * 20_000 + b"b" * 19_999,
        "itself": stub + b")Rq\1h\1b", "key": b"}" + stub + b")RNs", "items": stub + b")R(" + doubling + b"Nu",
    }.items():  # fmt: skip
        yield case(label, opcodes, HARMLESS)
    for i, value in enumerate(
        (None, 5, "x", [], {}, {"model": None}, {"model": 5}, {"model": {"decoder_layers": 10**9}})
    ):
        yield case(f"cfg{i}", cfg=lambda _, value=value: value)
        yield case(f"model{i}", model=lambda _, value=value: value)
        yield case(f"metadata{i}", shard_metadata=lambda _, value=value: value)
    for field in ("names", "shapes", "numels", "padding"):
        for i, value in enumerate(
            (None, 5, -1, "x", [], [None], [-1], [2**30] * 3, ["x"] * 3, [[2**30, 2**30]] * 3, [()] * 3)
        ):

            def changed(metadata, field=field, value=value):
                for unit in metadata["param_metadata"]:
                    for flat in unit["params"].values():
                        flat[field] = value
                return metadata

            yield case(f"{field}{i}", shard_metadata=changed)
