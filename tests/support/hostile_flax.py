"""Damaged and hostile files of weights in the form of Flax (msgpack)."""

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
from flax import serialization
from support.hostile_files import FC1, HARMLESS, REFUSED, Case


def packed(value: Any) -> bytes:
    content = msgpack.packb(value)
    assert content is not None
    return content


def packed_array(shape: Any, dtype: Any, data: Any, kind: int = 1) -> bytes:
    """An array as Flax packs it, whatever is given as its shape, dtype and bytes."""
    return packed(msgpack.ExtType(kind, packed((shape, dtype, data))))


def flax_cases(files: dict[str, bytes]) -> Iterator[Case]:
    name, entry = "flax_model.msgpack", "entry model/decoder/layers/0/fc1/kernel"
    checkpoint = files[name]
    data = np.asarray(serialization.msgpack_restore(checkpoint)["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"])
    (rows, columns), raw = data.shape, data.tobytes()
    fc1 = packed_array(data.shape, "float32", raw)
    assert checkpoint.count(fc1) == 1 and (rows, columns) == (8, 16)

    def case(label: str, content: bytes, *says: str, outcome: str = REFUSED) -> Case:
        return Case(f"flax/{label}", "flax", {name: content}, outcome, (name, *says))

    def with_fc1(other: bytes) -> bytes:
        return checkpoint.replace(fc1, other)

    def chunked(**fields) -> bytes:
        flat = {
            "shape": {"0": rows, "1": columns},
            "chunks": {"0": data.reshape(-1)[:100], "1": data.reshape(-1)[100:]},
        }
        marker = {"__msgpack_chunked_array__": True}
        return with_fc1(serialization.msgpack_serialize({**marker, **flat, **fields}))

    shapes = [
        [16, 8, 2],
        [128, 2],
        [],
        0,
        "ab",
        None,
        [True, 8],
        [2.0, 64],
        [-8, -16],
        [[8, 16]],
        ["8", "16"],
        [2**63, 2],
        [2**31, 2**33],
        [0, 2**62, 2**62],
        [1] * 40,
        [1] * 100_000,
        {"0": 8, "1": 16},
    ]
    for i, shape in enumerate(shapes):
        yield case(f"shape{i}", with_fc1(packed_array(shape, "float32", raw)), entry)
    yield Case(
        "flax/shape-of-another", "flax", {name: with_fc1(packed_array([16, 8], "float32", raw))}, REFUSED, (FC1,)
    )
    for dtype in (
        "float64",
        "bfloat16",
        "int8",
        "O",
        "object",
        "U4",
        "",
        "<f4",
        "x" * 5000,
        "\x1b[2J",
        5,
        None,
        [],
        b"f4",
    ):
        yield case(f"dtype-{str(dtype)[:8]!r}", with_fc1(packed_array(data.shape, dtype, raw)), entry)
    for i, content in enumerate((raw[:-1], raw + b"\0", b"", raw.decode("latin-1"), None, list(raw))):
        yield case(f"bytes{i}", with_fc1(packed_array(data.shape, "float32", content)), entry)
    for kind in (0, 2, 3, 99):
        yield case(f"extension{kind}", with_fc1(packed_array(data.shape, "float32", raw, kind)), entry)
    for i, value in enumerate(((), [], [data.shape, "float32"], [*data.shape, "float32", raw], {}, 5, b"x")):
        yield case(f"inner{i}", with_fc1(packed(msgpack.ExtType(1, packed(value)))), entry)
    for i, value in enumerate((None, True, 5, 2**63, -1, 1.5, "x", b"x", [], [1], {"a": 1}, {"a": None})):
        yield case(f"leaf{i}", with_fc1(packed(value)), entry)
    yield Case("flax/leaf-no-map", "flax", {name: with_fc1(b"\x80")}, REFUSED, (FC1,))
    for length in (0, 1, len(raw), 2**31, 2**32 - 1):
        yield case(f"length{length}", checkpoint.replace(fc1[:4], b"\xc9" + length.to_bytes(4, "big") + b"\1"))
    yield case("chunked", chunked(), outcome=HARMLESS)
    flat = data.reshape(-1)
    for i, fields in enumerate(
        (
            {"shape": {"0": 8}},
            {"shape": {"0": 8, "2": 16}},
            {"shape": {"0": 128, "1": 1, "2": 1}},
            {"shape": {"0": 8, "1": True}},
            {"shape": {"0": 8, "1": 17}},
            {"shape": {"0": 2**62, "1": 2**62}},
            {"shape": {"0": 0, "1": 16}},
            {"shape": {}},
            {"shape": 128},
            {"shape": {"0": flat}},
            {"chunks": {}},
            {"chunks": {"0": flat[:100]}},
            {"chunks": {"1": flat[:100], "2": flat[100:]}},
            {"chunks": {"0": flat, "1": flat}},
            {"chunks": {"0": data}},
            {"chunks": {"0": 5}},
            {"chunks": {"0": {"0": flat}}},
            {"chunks": flat},
            {"chunks": {"0": flat[:100], "1": flat[100:].astype(np.int32)}},
            {"more": 1},
        )
    ):
        yield case(f"chunks{i}", chunked(**fields), entry)
    yield case("chunks-alone", with_fc1(packed({"__msgpack_chunked_array__": True})), entry)
    key = b"\xa3fc1"
    for i, other in enumerate(
        (b"\xa3fc2", b"\xa3fc\n", b"\xa3\xff\xfe\xfd", b"\xa0", b"\x05", b"\xc0", b"\xc4\x03fc1", b"\x80", b"\x90")
    ):
        yield Case(f"flax/key{i}", "flax", {name: checkpoint.replace(key, other)})
    for width, code in ((2, b"\xda"), (4, b"\xdb")):
        for length in (0, 101, 2 ** (8 * width) - 1):
            changed = checkpoint.replace(key, code + length.to_bytes(width, "big"))
            yield Case(f"flax/key-length{width}{length}", "flax", {name: changed})
    yield case("key-long", checkpoint.replace(key, b"\xda\x07\xd0" + b"x" * 2000))
    for code, width in ((b"\xde", 2), (b"\xdf", 4)):
        yield case(f"entries{width}", checkpoint.replace(b"\x81", code + b"\xff" * width, 1))
        yield case(
            f"entries-few{width}", checkpoint.replace(b"\x81", code + (1).to_bytes(width, "big"), 1), outcome=HARMLESS
        )
    yield case("deep", b"\x81\xa1a" * 200_000)
    yield case("deep-lists", b"\x91" * 200_000)
    tiny = packed_array((), "int8", b"\0")
    many = b"".join(b"\xa6%06d" % i + tiny for i in range(60_000))
    yield case("many", b"\xdf" + (60_000).to_bytes(4, "big") + many, "more entries")
    yield case(
        "many-empty", b"\xdf" + (60_000).to_bytes(4, "big") + b"".join(b"\xa6%06d\x80" % i for i in range(60_000))
    )
    yield case("appended", checkpoint + b"\0", "1 bytes follow")
    yield case("twice", checkpoint + checkpoint, "bytes follow")
    for i, content in enumerate(
        (b"", b"\x80", b"\x90", b"\xc0", b"\xc1", b"\0", b"{}", b"PK\3\4", b"\xc7", bytes(1000))
    ):
        yield Case(f"flax/file{i}", "flax", {name: content}, REFUSED, () if content == b"\x80" else (name,))
