"""Damaged and malicious files of weights: safetensors files and torch's zip archives. Not a test itself."""

import json
import random
import struct
from collections.abc import Iterator

from support.hostile_files import EITHER, FC1, HARMLESS, REFUSED, Case, flip

# safetensors --------------------------------------------------------------------------------------------------------


def safetensors(header, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def safetensors_cases(files: dict[str, bytes]) -> Iterator[Case]:
    name = "model.safetensors"
    content = files[name]
    length = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + length], content[8 + length :]
    header = json.loads(raw)
    entry = header[FC1]
    start, end = entry["data_offsets"]

    def case(label: str, content: bytes, *says: str, outcome: str = REFUSED) -> Case:
        return Case(f"safetensors/{label}", "safetensors", {name: content}, outcome, says)

    def changed(**fields) -> bytes:
        return safetensors(header | {FC1: entry | fields}, data)

    offsets = [
        [-1, end],
        [start, -end],
        [end, start],
        [start, end + 1],
        [start - 4, end - 4],
        [start + 4, end + 4],
        [0, end - start],
        [start, 2**63],
        [2**63, 2**63 + end - start],
        [2**64 + start, 2**64 + end],
        [10**400, 10**400 + end - start],
        [start],
        [start, end, end],
        [],
        {},
        None,
        "ab",
        5,
        [str(start), str(end)],
        [float(start), float(end)],
        [True, False],
        [[start], [end]],
        [None, None],
        [start, [end]],
    ]
    for i, value in enumerate(offsets):
        says = (name, "tensor ") if i == 6 else (name, f"tensor {FC1}")  # the error names the tensor that it overlaps
        yield case(f"offsets{i}", changed(data_offsets=value), *says)
    shapes = [
        [8, 16],
        [128],
        [16, 9],
        [16, 8, 1],
        [1, 16, 8],
        [4, 32],
        [],
        [-16, -8],
        [16, -8],
        [0, 8],
        [2**31, 2**33],
        [2**32, 2**32],
        [10**4000, 8],
        [0, 2**62, 2**62],
        [16.0, 8.0],
        [True, 8],
        ["16", "8"],
        "",
        "ab",
        None,
        {},
        {"16": 8},
        128,
        [[16, 8]],
        [None],
        [1] * 40 + [16, 8],
        [1] * 10_000,
        [2] * 100,
        [16, 8] + [0] * 70,
    ]
    for i, value in enumerate(shapes):
        yield case(f"shape{i}", changed(shape=value), *((name,) if i > 5 else ()), FC1)
    for dtype in ("F64", "F16", "BF16", "I8", "F8_E4M3", "f32", "", "\x1b[2J", "x" * 5000, 32, None, ["F32"], {}):
        yield case(f"dtype-{str(dtype)[:8]!r}", changed(dtype=dtype), name, f"tensor {FC1}")
    yield case("dtype-of-the-same-width", changed(dtype="I32"), FC1)
    for i, value in enumerate(([], None, 5, "x", {}, {"dtype": "F32"}, [["dtype", "F32"]], {"shape": [16, 8]})):
        yield case(f"entry{i}", safetensors(header | {FC1: value}, data), name, f"tensor {FC1}")
    yield case("more-fields", changed(surprise=1), outcome=EITHER)
    others = {n: e for n, e in header.items() if n != FC1}
    for i, other in enumerate(
        (
            "x",
            "",
            " ",
            FC1.upper(),
            FC1 + "\0",
            FC1 + "\n",
            "\x1b[31m",
            "\ud800",
            "x" * 100_000,
            "../x",
            "model.decoder.layers.00.fc1.weight",
            "model.decoder.layers.999999999999999999999.fc1.weight",
            "model.decoder.layers.1.fc1.weight",
            "lm_head.weight",
            "__metadata__",
        )
    ):
        yield case(f"name{i}", safetensors(others | {other: entry}, data))
    twice = raw.rstrip()[:-1] + b"," + json.dumps({FC1: entry})[1:].encode()
    yield case("twice", safetensors(twice, data), name, f"{FC1} is there twice")
    yield case("all-at-once", safetensors(dict.fromkeys(header, entry), data), name, "tensor ")
    yield case("no-tensors", safetensors({}, b""))
    yield case("no-tensors-but-data", safetensors({}, data), name)
    yield case("gap", safetensors(header, data + bytes(4)), name)
    for i, metadata in enumerate(([], 5, "x", {"a": 1}, {"a": {}}, {"a": None})):
        yield case(f"metadata{i}", safetensors(header | {"__metadata__": metadata}, data), name, "__metadata__")
    yield case("metadata-null", safetensors(header | {"__metadata__": None}, data), outcome=HARMLESS)
    yield case("metadata-fine", safetensors(header | {"__metadata__": {"a": "b"}}, data), outcome=HARMLESS)
    for i, text in enumerate(
        (
            b"",
            b"[]",
            b"null",
            b"5",
            b"{",
            b"\xff\xfe{}",
            b"\xef\xbb\xbf{}",
            b"[" * 200_000,
            b'{"a":' * 200_000,
            b'{"x":NaN}',
            b'{"x":Infinity}',
            b'{"x":' + b"9" * 5000 + b"}",
            raw + b"{}",
            raw + b"\0",
            raw.rstrip()[:-1],
            b"'" + raw,
            raw.decode().encode("utf-16"),
            b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,Infinity]}}',
            b'{"x":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}',
            b"{" + b",".join(b'"%d":0' % i for i in range(20_000)) + b',"7":1}',
            b"[" + b"[]," * 100_000 + b"[]]",
        )
    ):
        yield case(f"json{i}", safetensors(text, data), name)
    yield case("padded", safetensors(raw + b" " * 99, data), outcome=HARMLESS)
    for n in (
        0,
        1,
        length - 1,
        length + 1,
        len(content) - 8,
        len(content) - 7,
        2**31,
        2**32 - 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ):
        yield case(f"length{n}", n.to_bytes(8, "little") + content[8:], name)
    for bit in random.Random(1).sample(range((8 + length) * 8), 40):
        yield case(f"header-bit{bit}", flip(content, bit), outcome=EITHER)


# torch zip ----------------------------------------------------------------------------------------------------------


def zip_cases(files: dict[str, bytes]) -> Iterator[Case]:
    name = "pytorch_model.bin"
    archive = files[name]
    end = len(archive) - 22
    directory, *_ = struct.unpack_from("<I", archive, end + 16)
    entries, at = [], directory
    while archive[at : at + 4] == b"PK\1\2":
        entries.append(at)
        at += 46 + sum(struct.unpack_from("<HHH", archive, at + 28))
    local = [struct.unpack_from("<I", archive, entry + 42)[0] for entry in entries]

    def patched(*patches: tuple[int, str, int]) -> bytes:
        content = bytearray(archive)
        for at, form, value in patches:
            struct.pack_into("<" + form, content, at, value)
        return bytes(content)

    def case(label: str, content: bytes, *says: str, outcome: str = REFUSED) -> Case:
        return Case(f"zip/{label}", "bin", {name: content}, outcome, (name, *says))

    yield case("prepended", b"#!/bin/sh\n" + archive)
    yield case("prepended-zeros", bytes(64) + archive)
    yield case("prepended-zip", archive + archive)
    yield case("appended", archive + bytes(8))
    yield case("comment", archive[:-2] + b"\5\0hello")
    yield case("comment-with-another-end", archive[:-2] + struct.pack("<H", 22) + archive[end:])
    for field, form, values in (
        (4, "H", (1, 0xFFFF)),
        (6, "H", (1,)),
        (8, "H", (0, 1, 0xFFFF)),
        (10, "H", (0, 1, 0xFFFF)),
        (12, "I", (0, 1, 2**32 - 1)),
        (16, "I", (0, directory + 46, len(archive), 2**32 - 1)),
    ):
        for value in values:
            yield case(f"end{field}={value}", patched((end + field, form, value)))
    for which in (0, 3):  # the pickle and a storage
        entry, header = entries[which], local[which]
        for field, form, values in (
            (0, "I", (0,)),
            (8, "H", (1, 8, 64)),
            (10, "H", (8, 14, 99)),
            (20, "I", (0, 1, 2**32 - 1)),
            (24, "I", (0, 1, 2**32 - 1)),
            (28, "H", (0, 1, 0xFFFF)),
            (30, "H", (1, 0xFFFF)),
            (32, "H", (1, 0xFFFF)),
            (34, "H", (1,)),
            (42, "I", (0, 1, local[1], directory, end, len(archive), 2**32 - 1)),
        ):
            for value in values:
                if field == 42 and value == header:
                    continue
                yield case(f"entry{which}+{field}={value}", patched((entry + field, form, value)))
        for field, form, values in (
            (0, "I", (0,)),
            (6, "H", (1, 8)),
            (8, "H", (8,)),
            (18, "I", (1, 2**32 - 1)),
            (22, "I", (1, 2**31)),
            (26, "H", (0, 1, 0xFFFF)),
            (28, "H", (0xFFFF,)),
            (30, "H", (0x2F2E,)),
        ):
            for value in values:
                yield case(f"local{which}+{field}={value}", patched((header + field, form, value)))
        yield case(f"both{which}-encrypted", patched((entry + 8, "H", 1), (header + 6, "H", 1)))
        size = struct.unpack_from("<I", archive, entry + 24)[0] + 200
        grown = [(at, "I", size) for at in (entry + 20, entry + 24, header + 18, header + 22)]
        yield case(f"both{which}-overlap-the-next", patched(*grown), "overlaps")
    yield case("pickle-crc", patched((entries[0] + 16, "I", 1)), "checksum")
    yield case("no-crc", patched(*[(entry + 16, "I", 0) for entry in entries]), outcome=HARMLESS)
    sizes = [(at, "I", 2**32 - 1) for at in (entries[3] + 20, entries[3] + 24)]
    yield case("zip64-without-numbers", patched(*sizes))
    yield case("two-records-are-one", patched((entries[4] + 42, "I", local[3])))
    twice = archive[directory : entries[1]]
    longer = archive[:end] + twice + archive[end:]
    more = struct.pack("<HHI", len(entries) + 1, len(entries) + 1, end - directory + len(twice))
    yield case("record-twice", longer[: end + len(twice) + 8] + more + longer[end + len(twice) + 16 :], "twice")
    for bit in random.Random(2).sample(range(directory * 8, len(archive) * 8), 40):
        yield Case(f"zip/directory-bit{bit}", "bin", {name: flip(archive, bit)}, EITHER)
