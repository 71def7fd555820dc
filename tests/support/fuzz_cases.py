"""Damage to files, answers and options, drawn by hypothesis. Not a test itself.

A case is plain data: the name of a file and the edits that damage it, or arguments. So a failing case can be written
down.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Many:
    """A text that is repeated. In JSON it becomes a string.

    Attributes:
      text: the text.
      times: how often it is repeated.
      raw: whether it is put into JSON as it is, and not as a string.
      around: what replaces it, with the repeated text for "{}".
    """

    text: str
    times: int = 1
    raw: bool = False
    around: str = "{}"

    def __str__(self) -> str:
        return self.around.replace("{}", self.text * self.times)


NUMBERS = (
    -1, 0, 1, 2, 3, 255, 2**31, 2**32 + 5, 2**63, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e308, math.nan,
    math.inf,
    True, False, Many("9", 5000, raw=True), Many("1e999", raw=True),
)  # fmt: skip
STRINGS = (
    "", "x", "1", "\0", "\x1b[2J\n\r", "\ud800", "\u2028\u202e", "\u2603", "../../x", "/etc/passwd", "</s>", "<s>",
    "\u0120",
    Many("x", 3000), Many("x ", 500_000), "left", "int32", "none",
)  # fmt: skip
OTHERS = (
    None, [], {}, [[]], [None], [1], [-1], ["x"], ["a", "b"], {"a": 1}, {"0": "x"}, {"1": {"content": "x"}}, [[1, 2]],
    Many("[", 100_000, raw=True), Many('{"a":', 100_000, raw=True), Many("[", 600, True, "{}" + "]" * 600),
    Many("0,", 100_000, True, "[{}0]"), Many('["x","y"],', 20_000, True, "[{}[]]"),
)  # fmt: skip
VALUES = st.one_of(*map(st.sampled_from, (NUMBERS, STRINGS, OTHERS)))
_KEYS = ("", "x", "\0", "\ud800", "\n", "0", "-1", "99999999999999999999", "\u00b2", Many("x", 3000))
_TREE, _BYTES = (
    ("set", "set", "set", "copy", "drop", "rename", "twice"),
    ("flip", "flip", "cut", "insert", "remove", "double"),
)
_FILES = (b"", b"null", b"[]", b"{}", b"3", b'"x"', b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 200_000, b"\0" * 100)
_INSERTED = (b"\0", b"\xff", b"\n", b"\xed\xa0\x80", b",", b"[", b"}", b'"', b"9" * 400, b"\x1b[2J", bytes(5000))


# Files --------------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw: Any, files: Mapping[str, bytes]) -> tuple[str, tuple]:
    """(name of one of the files, one to three edits of it for `edited`)."""
    name = draw(st.sampled_from(sorted(files)))
    return name, draw(edits(files[name]))


@st.composite
def edits(draw: Any, content: bytes) -> tuple:
    tree = _parsed(content)
    done = [draw(_edit_of_tree(tree)) for _ in range(draw(st.integers(1, 3)))] if tree else []
    if not done or not draw(st.integers(0, 5)):
        done.append(draw(_edit_of_bytes(len(content))))
    return tuple(done)


@st.composite
def _edit_of_tree(draw: Any, tree: Any) -> tuple:
    kind, path = draw(st.sampled_from(_TREE)), draw(_path(tree))
    if kind == "set" or kind == "twice":
        return kind, path, draw(st.one_of(VALUES, st.lists(VALUES, max_size=3)))
    if kind == "copy":
        return kind, path, draw(_path(tree))
    return (kind, path, draw(st.sampled_from(_KEYS))) if kind == "rename" else (kind, path)


@st.composite
def _path(draw: Any, tree: Any) -> tuple:
    """A path of keys from the root down. It may end at each step, so that not only the many leaves are drawn."""
    path = []
    while isinstance(tree, dict | list) and tree and (not path or draw(st.integers(0, 3))):
        path.append(draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree)))))
        tree = tree[path[-1]]
    return tuple(path)


@st.composite
def _edit_of_bytes(draw: Any, length: int) -> tuple:
    kind, at = draw(st.sampled_from((*_BYTES, "replace"))), draw(st.integers(0, length))
    if kind == "replace":
        return kind, draw(st.sampled_from(_FILES))
    more: dict[str, Any] = dict(flip=st.integers(0, 7), insert=st.sampled_from(_INSERTED), cut=st.none())
    return kind, at, draw(more.get(kind, st.integers(1, 32)))


def edited(content: bytes, changes: Sequence[tuple]) -> bytes:
    """The content after all edits: first those of the JSON tree, then those of the bytes.

    Args:
      content: of a file.
      changes: of the tree ("set", path, value), ("copy", to, from), ("drop", path), ("rename", path, key), ("twice",
        path, value of the second key). Of the bytes ("flip", at, bit), ("cut", at, None), ("insert", at, bytes),
        ("remove" or "double", at, length), ("replace", the new content).
    """
    in_tree = [change for change in changes if change[0] in _TREE]
    if in_tree:
        content = _edited_tree(json.loads(content), in_tree)
    for kind, at, *more in (change for change in changes if change[0] not in _TREE):
        value: Any = more[0] if more else None
        if kind == "replace":
            content = at
        elif kind == "flip" and content:
            at %= len(content)
            content = content[:at] + bytes([content[at] ^ 1 << value]) + content[at + 1 :]
        elif kind != "flip":
            after = {"cut": len(content), "insert": at, "remove": at + (value if kind == "remove" else 0), "double": at}
            between = value if kind == "insert" else content[at : at + value] if kind == "double" else b""
            content = content[:at] + between + content[after[kind] :]
    return content


def _edited_tree(tree: Any, changes: Sequence[tuple]) -> bytes:
    root = {"": tree}
    texts: list[tuple[str, str]] = []  # JSON of a marker -> its replacement

    def marked(replacement: str) -> str:
        marker = f"\ue000{len(texts)}\ue001"
        texts.append((json.dumps(marker), replacement))
        return marker

    def plain(value: Any) -> Any:
        """`value` with a marker for each `Many`, so that `json.dumps` can write it."""
        if isinstance(value, Many):
            return marked(str(value) if value.raw else json.dumps(str(value)))
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value

    for kind, path, *more in changes:
        *parents, last = ("", *path)
        try:
            node: Any = root
            for part in parents:
                node = node[part]
            old = node[last]
            if kind == "set":
                node[last] = plain(more[0])
            elif kind == "copy":
                value: Any = tree
                for part in more[0]:
                    value = value[part]
                node[last] = json.loads(json.dumps(value))
            elif kind == "drop" and path:
                del node[last]
            elif kind == "rename" and isinstance(node, dict) and path:
                node[str(more[0])] = node.pop(last)
            elif kind == "twice" and isinstance(node, dict) and path:
                node[last] = old
                node[marked(json.dumps(last))] = plain(more[0])
        except (KeyError, IndexError, TypeError):  # an earlier edit has removed the node
            continue
    text = json.dumps(root[""])
    for marker, replacement in texts:
        text = text.replace(marker, replacement)
    return text.encode()


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


# Headers of arrays --------------------------------------------------------------------------------------------------

_DESCRS = (
    "'<u2'", "'<i4'", "'>u2'", "'|u1'", "'<i8'", "'<u8'", "'<f4'", "'<f8'", "'|b1'", "'<c8'", "'|O'", "'<U4'", "'|S0'",
    "'|V7'",
    "'|V4000000000'", "'<U2000000000'", "'<M8[ns]'", "'<m8'", "[('a', '<u2')]", "[('a', '<u2', (2,))]", "'u2,u2'",
    "'x'", "''",
    "None", "3", "[]", "()", "{}", "('<u2', (3,))", "('<u2', (2**60,))", "'<u3'", "b'<u2'", "'\\x00'", "'<u2\\n'",
    "[('<u2',)]",
    "[('a', 'O')]", "'(2,)<u2'", "'(1000000,1000000)<u8'", "True", "'int'", "'<i0'", "'float16'", "'bfloat16'",
    "[('', '|V1')]", "[('a', '|V1'), ('a', '<u2')]", "'a' * 3", "'" + "(" * 2000 + "'",
)  # fmt: skip
_SHAPES = (
    "(50,)", "()", "(0,)", "(1,)", "(5, 10)", "(51,)", "(2**40,)", "(1099511627776,)", "(9223372036854775807,)",
    "(18446744073709551616,)", "(4611686018427387904, 4)", "(-1,)", "(-50,)", "(50.0,)", "(True,)", "('50',)", "[50]",
    "50",
    "None", "(None,)", "{}", "(50, 1, 1)", "(" + "1, " * 70 + ")", "(" + "0, " * 30 + ")", "(50, 0)", "((50,),)",
    "(" * 150 + ")" * 150,
    "(" + "9" * 4000 + ",)", "(" + "9" * 5000 + ",)", "-" * 9000 + "1", "(1e400,)", "(" + "-" * 3000 + "50,)",
)  # fmt: skip
_ORDERS = ("False", "True", "0", "1", "None", "'x'", "[]", "nan", "1e400")
_HEADERS = (
    "{'descr': %(descr)s, 'fortran_order': %(order)s, 'shape': %(shape)s}",
    "{'descr': %(descr)s, 'fortran_order': %(order)s, 'shape': %(shape)s, 'more': 1}",
    "{'descr': %(descr)s, 'descr': %(descr)s, 'fortran_order': %(order)s, 'shape': %(shape)s}",
    "{'descr': %(descr)s, 'shape': %(shape)s}", "(%(descr)s, %(order)s, %(shape)s)", "%(shape)s", "", "\0", "\xff", "{",
    "{1: 2}",
    "{'descr': %(descr)s, 'fortran_order': %(order)s, 'shape': %(shape)s} # ", "__import__('os').abort()",
    "{'descr': %(descr)s, 'fortran_order': %(order)s, 'shape': %(shape)sL}", "{'descr':\n" * 50, "{[]: 1}",
)  # fmt: skip


def mostly(first: Any, *others: Any) -> st.SearchStrategy:
    """The first value half of the time, because several faults at once would hide each other."""
    return st.one_of(st.just(first), st.sampled_from((first, *others)))


def npy_file(header: str, version: tuple[int, int] = (1, 0), length: int | None = None) -> tuple[str, bytes]:
    """A .npy file of 50 numbers of 16 bits. Its header and the length of the header may be false."""
    raw = header.encode("latin-1")
    size = (len(raw) if length is None else length).to_bytes(2 if version[0] == 1 else 4, "little")
    return "a.npy", b"\x93NUMPY" + bytes(version) + size + raw + np.arange(50, dtype=np.uint16).tobytes()


@st.composite
def arrays(draw: Any) -> tuple[str, bytes]:
    """Files of arrays with false headers."""
    fields = {"descr": draw(mostly(*_DESCRS)), "order": draw(mostly(*_ORDERS)), "shape": draw(mostly(*_SHAPES))}
    header = draw(mostly(*_HEADERS)) % fields
    width = draw(mostly(-(-(len(header) + 11) // 64) * 64 - 11, 0, 9990, 10_100, 65_000))
    header = header.ljust(width) + "\n"
    version = draw(mostly((1, 0), (2, 0), (3, 0), (4, 0), (0, 0), (255, 255)))
    length = draw(mostly(len(header), 0, 1, len(header) + 1, len(header) + 99, 65_535, 10_001, 2**32 - 1, 2**31))
    name, content = npy_file(header, version, length % 2**16 if version[0] == 1 else length)
    if not draw(st.integers(0, 4)):
        content = edited(content, [draw(_edit_of_bytes(len(content)))])
    return name, content


# Options of generate --------------------------------------------------------------------------------------------------


def _arrays() -> Iterator[Any]:
    for dtype in ("int64", "uint8", "uint64", "float32", "bool", "complex64", "U1", "O", "M8[s]", "S3"):
        yield np.ones((2, 3), dtype)
    yield from (
        np.array(5),
        np.array(2**63, np.uint64),
        np.zeros((0, 3), int),
        np.zeros((2, 0), int),
        np.array([-1, 2**40]),
    )
    yield from (
        np.ones((1,) * 30, int),
        np.array([(1, 2)], "i4,i4"),
        np.array(None),
        np.array([[math.nan]]),
        np.float32(2),
    )
    yield from (np.int8(-3), np.bool_(True), np.array([[3, 4], [5]], dtype=object), np.array("x"), np.arange(10_000))


_SCALARS = (
    None, True, False, -1, 0, 1, 2, 3, 5, 8, 40, 47, 48, 100, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 10**30,
    10**400, 0.5, 1.0,
    -0.5, 1e-320, 1e-30, 1e308, math.nan, math.inf, -math.inf, 1j, "", "x", "never", "int8", "float32", "1",
    "\x1b[2J\n", "\ud800",
    "x" * 3000, b"", b"x", object, range(3), range(2**70), frozenset({1, 2}), {"a": 1}, {}, (), [], [[]], [[[]]],
    [1], [1, 2], [[1], [2, 3]], [[1, 2], []], [[1], 2], ["x"], ["x", ""], [None], [[None]], [["x"]], [1.5], [True],
    [-1], [48],
    [2**64], [10**400], [[[1]]], [{}], {1: 2}, [math.nan], [1] * 100_000, [[1]] * 10_000,
    [[1] * 100_000, *[[1]] * 1000], [[3]] * 1000,
    ["x" * 100_000], ["\ud800"], "x" * 1_000_000, list(range(48)), slice(3), Ellipsis, ValueError("x"),
)  # fmt: skip
_FINE = (1, 2, 3, 0.5, True, [3], [[3, 4]], "never", "int8", "ab", [5], 0)
_ANY = st.one_of(*map(st.sampled_from, (_FINE, _FINE, _SCALARS, list(_arrays()))))
_IDS = st.one_of(
    st.sampled_from(
        ([[5, 6, 7]], [[5, 6, 7], [1, 6, 7]], [[5], [6, 7]], np.array([[5, 6]]), [[5] * 16], [[5] * 17], [[5, 1]])
    ),
    _ANY,
)


@st.composite
def requests(draw: Any, names: Sequence[str]) -> dict[str, Any]:
    """Arguments for `check_request` and the checks after it."""
    case: dict[str, Any] = {"input_ids": draw(_IDS) if not draw(st.integers(0, 3)) else [[5, 6, 7]]}
    if not draw(st.integers(0, 3)):
        case["attention_mask"] = draw(st.one_of(st.just([[0, 1, 1]]), _ANY))
    if not draw(st.integers(0, 5)):
        case[draw(st.sampled_from(("prefix", "tokenizer", "generation_config", "batch_size", "assistant_model")))] = (
            draw(_ANY)
        )
    size = draw(st.integers(0, 3))
    options = draw(st.dictionaries(st.sampled_from(names), _ANY, min_size=size, max_size=size))
    if draw(st.booleans()):
        options = {"do_sample": True} | options
    return case | {"options": options}


# Answers of hubs ------------------------------------------------------------------------------------------------------

_HEADER_NAMES = (
    "ETag", "X_Linked_ETag", "X_Linked_Size", "X_Repo_Commit", "X_Xet_Hash", "Content_Length", "Content_Range",
    "Content_Type",
    "Content_Encoding", "Transfer_Encoding", "Retry_After", "RateLimit", "Location", "Link", "X_Error_Code",
    "X_Error_Message",
    "X_Xet_Refresh_Route", "Content_Disposition", "Set_Cookie",
)  # fmt: skip
_HEADER_VALUES = (
    "", "x", "0", "1", "-1", "5", "7", "9" * 30, "9" * 5000, "1e9", "0x10", "\xb2", "\xff\xfe", "nan", "a" * 40,
    '"' + "a" * 40 + '"',
    "W/" + '"' + "b" * 64 + '"', "../../../../x", "..%2f..%2fx", "a\r\nX-Repo-Commit: ../x", "\x1b[2J", "x" * 60_000,
    "gzip", "br, gzip", "identity", "chunked", "bytes 0-0/1", "bytes */0", "bytes 5-1/7", "file:///etc/passwd", "/",
    "//", "http://",
    "http://127.0.0.1:1/x", "http://[::1", "/org/model/resolve/main/config.json", "?", "ftp://127.0.0.1/x",
    "http://\xff/",
    '<x>; rel="next"', '<file:///etc/passwd>; rel="next"', '<; rel="next"', "GatedRepo", "EntryNotFound",
    "RevisionNotFound",
    "Wed, 21 Oct 2099 07:28:00 GMT", '"a";r=0;t=9999', "text/html", "application/json; charset=utf-16",
)  # fmt: skip


@st.composite
def answers(draw: Any, files: Mapping[str, bytes]) -> tuple[str, Any]:
    """What a hub answers instead: ("info" or "tree", edits), ("headers", headers of answers about files), ("statuses",
    (statuses of the first answers, their headers)), or ("sent", contents of files)."""
    kind = draw(st.sampled_from(("info", "tree", "headers", "headers", "statuses", "sent")))
    headers = st.dictionaries(st.sampled_from(_HEADER_NAMES), st.sampled_from(_HEADER_VALUES), min_size=1, max_size=2)
    if kind in ("info", "tree"):
        return kind, draw(edits(files[kind]))
    if kind == "headers":
        return kind, draw(headers)
    if kind == "statuses":
        codes = (
            0,
            0,
            200,
            204,
            206,
            299,
            301,
            302,
            304,
            307,
            400,
            401,
            403,
            404,
            408,
            416,
            418,
            429,
            500,
            503,
            599,
            999,
        )
        return kind, (tuple(draw(st.lists(st.sampled_from(codes), min_size=1, max_size=4))), draw(headers))
    names = st.sampled_from(("config.json", "merges.txt", "model.safetensors", "model.safetensors.index.json"))
    return kind, draw(st.dictionaries(names, st.sampled_from((*_FILES, bytes(10_000))), min_size=1, max_size=2))
