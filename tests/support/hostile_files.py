"""Damaged and malicious checkpoints by the hundred, as changes to small valid ones. Not a test itself.

Every generator is deterministic. A case is data: which files of which checkpoint have which content instead.
"""

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.hf_files import VARIANTS

CONFIG = VARIANTS["galactica"] | {"num_hidden_layers": 1}  # 8 tensors: the fewest a model can have
FC1 = "model.decoder.layers.0.fc1.weight"  # the tensor that damage is done to
EMBED = "model.decoder.embed_tokens.weight"
REFUSED, HARMLESS, EITHER = "refused", "harmless", "either"


@dataclass(frozen=True)
class Case:
    """
    Attributes:
      form: the valid checkpoint that is changed. changes: file -> new content,
      None (removed) or what a link points to.
      outcome: REFUSED, HARMLESS (the conversion succeeds) or EITHER.
      says: what the error must hold, beside the directory.
    """

    name: str
    form: str
    changes: dict[str, bytes | None | Path]
    outcome: str = REFUSED
    says: tuple[str, ...] = ()


# Any file -----------------------------------------------------------------------------------------------------------


def random_damage(form: str, files: dict[str, bytes], count: int, seed: int, says_file: bool = True) -> Iterator[Case]:
    """Truncated, flipped, overwritten, shifted, grown files."""
    rng = random.Random(seed)
    names = sorted(name for name, content in files.items() if content)
    for i in range(count):
        name = rng.choice(names)
        content = files[name]
        at, n = rng.randrange(len(content)), rng.randrange(1, 33)
        kind = rng.choice(
            ("truncated", "flipped", "flipped", "flipped", "zeroed", "random", "removed", "doubled", "longer")
        )
        damaged = {
            "truncated": content[:at],
            "flipped": flip(content, at * 8 + rng.randrange(8)),
            "zeroed": content[:at] + bytes(n) + content[at + n :],
            "random": content[:at] + rng.randbytes(n) + content[at + n :],
            "removed": content[:at] + content[at + n :],
            "doubled": content[:at] + content[at : at + n] + content[at:],
            "longer": content + rng.randbytes(n),
        }[kind]
        outcome = REFUSED if kind == "truncated" and not name.endswith(".json") and says_file else EITHER
        yield Case(f"{form}/{name}/{kind}{i}", form, {name: damaged}, outcome, (name,) if outcome == REFUSED else ())


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# safetensors --------------------------------------------------------------------------------------------------------


def safetensors(header, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def safetensors_cases(files: dict[str, bytes]) -> Iterator[Case]:
    name = "model.safetensors"
    whole = files[name]
    length = int.from_bytes(whole[:8], "little")
    raw, data = whole[8 : 8 + length], whole[8 + length :]
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
        says = (name, "tensor ") if i == 6 else (name, f"tensor {FC1}")  # another one is found to overlap
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
        len(whole) - 8,
        len(whole) - 7,
        2**31,
        2**32 - 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ):
        yield case(f"length{n}", n.to_bytes(8, "little") + whole[8:], name)
    for bit in random.Random(1).sample(range((8 + length) * 8), 40):
        yield case(f"header-bit{bit}", flip(whole, bit), outcome=EITHER)


# Indices and configs ------------------------------------------------------------------------------------------------


def index_cases(form: str, files: dict[str, bytes]) -> Iterator[Case]:
    index = next(name for name in files if name.endswith(".index.json"))
    content = json.loads(files[index])
    weight_map = content["weight_map"]
    shards = sorted(set(weight_map.values()))

    def case(label: str, new: bytes | str | dict, *says: str, outcome: str = REFUSED, **changes) -> Case:
        raw = json.dumps(new).encode() if isinstance(new, dict) else new.encode() if isinstance(new, str) else new
        return Case(f"{form}/{label}", form, {index: raw, **changes}, outcome, says)

    for i, value in enumerate(
        (
            "absent.bin",
            "../secret.safetensors",
            "/etc/passwd",
            "../../../../../../etc/passwd",
            "..",
            ".",
            "",
            "a/b",
            "x\0y",
            "x\ny",
            "\x1b[31m",
            "x" * 300,
            "\ud800",
            "./" + shards[0],
            "//" + shards[0],
            shards[0] + "/",
            "config.json",
            index,
            "~/x",
            "..\\x",
            "/dev/zero",
            "/proc/self/mem",
            5,
            None,
            True,
            [],
            {},
            [shards[0]],
            1.5,
        )
    ):
        yield case(f"file{i}", content | {"weight_map": weight_map | {FC1: value}})
    for i, value in enumerate(([], {}, None, 5, "x", list(weight_map.items()), {"weight_map": weight_map})):
        yield case(f"map{i}", {"weight_map": value})
    for i, text in enumerate(
        ("", "{", "[]", "null", "5", '"x"', "[" * 200_000, '{"weight_map":' * 200_000, "{}", "\ufeff{}", "NaN")
    ):
        yield case(f"json{i}", text, index)
    yield case("bytes", b"\xff\xff", index)
    yield case("only-one-shard", {"weight_map": dict.fromkeys(weight_map, shards[0])}, shards[0], "tensor ")
    yield case(
        "tensor-not-in-the-shard", {"weight_map": weight_map | {"nowhere": shards[0]}}, shards[0], "tensor nowhere"
    )
    yield case("not-in-the-index", {"weight_map": {n: f for n, f in weight_map.items() if f != shards[1]}}, "tensor ")
    for a, b in (shards, shards[::-1]):
        yield Case(f"{form}/shard-twice-{a}", form, {a: files[b]}, REFUSED, ("tensor ",))
        yield Case(f"{form}/absent-{a}", form, {a: None}, REFUSED, (a,))
        yield Case(f"{form}/empty-{a}", form, {a: b""}, REFUSED, (a,))
        yield Case(f"{form}/loop-{a}", form, {a: Path(a)}, REFUSED, (a,))
        yield Case(f"{form}/device-{a}", form, {a: Path("/dev/zero")}, REFUSED, (a,))
        yield Case(f"{form}/directory-{a}", form, {a: Path("..")}, REFUSED, (a,))


def config_cases() -> Iterator[Case]:
    def case(label: str, text: str | dict, *says: str, outcome: str = REFUSED, **changes) -> Case:
        raw = (json.dumps(text) if isinstance(text, dict) else text).encode("utf-8", "surrogatepass")
        return Case(f"config/{label}", "safetensors", {"config.json": raw, **changes}, outcome, says)

    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "ffn_dim",
        "max_position_embeddings",
        "num_attention_heads",
    )
    for field in sizes:
        for value in (10**5, 10**9, 2**31, 10**15, 2**63, 10**40, 0, -1, 1.5, "8", None, [], {}, True):
            yield case(f"{field}={value}", CONFIG | {field: value})
    for field, value in (
        ("word_embed_proj_dim", 10**9),
        ("word_embed_proj_dim", 10**30),
        ("activation_function", "os.system"),
        ("activation_function", ["relu"]),
        ("model_type", "gpt2"),
        ("model_type", {}),
        ("architectures", [[]]),
        ("architectures", ["OPTForQuestionAnswering"]),
        ("enable_bias", True),
        ("activation_function", "\x1b[31m\n" * 3000),
        ("problem_type", {}),
        ("enable_bias", "no"),
        ("eos_token_id", [[2]]),
        ("tie_word_embeddings", False),
        ("do_layer_norm_before", 0),
        ("layer_norm_elementwise_affine", True),
        ("dropout", "x"),
        ("pad_token_id", 10**9),
        ("bos_token_id", -1),
        ("init_std", []),
    ):
        yield case(f"{field}={str(value)[:30]!r}", CONFIG | {field: value})
    for value in ("OPTForCausalLM", ["__class__"], ["OPTForCausalLM", "OPTModel"], ["x" * 10_000], ["\x1b[31m\n"]):
        yield case(f"architectures={str(value)[:30]!r}", CONFIG | {"architectures": value}, outcome=HARMLESS)
    for field, value in (
        ("auto_map", {"AutoModel": "evil.Evil"}),
        ("_name_or_path", "../../secret"),
        ("tokenizer_class", "os.system"),
        ("num_labels", 10**12),
        ("id2label", {"0": "x" * 1000}),
        ("dtype", "../x"),
        ("torch_dtype", {}),
        ("x", "\ud800"),
        ("custom_pipelines", {"x": {"impl": "evil.py"}}),
        ("quantization_config", {"a": 1}),
    ):
        yield case(f"{field}={str(value)[:30]!r}", CONFIG | {field: value}, outcome=EITHER)
    for i, text in enumerate(
        (
            "",
            "{",
            "[]",
            "null",
            "5",
            "NaN",
            "[" * 200_000,
            '{"a":' * 200_000,
            '{"vocab_size":' + "9" * 5000 + "}",
            "\ud800",
            "\ufeff{}",
            "{}x",
        )
    ):
        yield case(f"json{i}", text, "config.json")
    fine = json.dumps(CONFIG)
    paths = {
        "tokenizer_file": "../secret.safetensors",
        "vocab_file": "/etc/passwd",
        "auto_map": {"AutoTokenizer": ["evil.T", None]},
    }
    yield case(
        "tokenizer-names-other-files", fine, outcome=HARMLESS, **{"tokenizer_config.json": json.dumps(paths).encode()}
    )
    yield case(
        "companions-are-no-json",
        fine,
        outcome=HARMLESS,
        **dict.fromkeys(("vocab.json", "generation_config.json"), b"\xff["),
    )
    yield case("companion-is-a-directory", fine, outcome=EITHER, **{"vocab.json": Path("..")})
    yield case("companion-is-a-device", fine, outcome=EITHER, **{"vocab.json": Path("/dev/zero")})
    yield case("companion-is-a-loop", fine, outcome=EITHER, **{"vocab.json": Path("vocab.json")})
    for link in ("config.json", "model.safetensors"):
        yield Case(f"config/loop-{link}", "safetensors", {link: Path(link)}, REFUSED)
        yield Case(f"config/device-{link}", "safetensors", {link: Path("/dev/zero")}, REFUSED)
        yield Case(f"config/absent-{link}", "safetensors", {link: None}, REFUSED)


# torch zip ----------------------------------------------------------------------------------------------------------


def zip_cases(files: dict[str, bytes]) -> Iterator[Case]:
    name = "pytorch_model.bin"
    whole = files[name]
    end = len(whole) - 22
    directory, *_ = struct.unpack_from("<I", whole, end + 16)
    entries, at = [], directory
    while whole[at : at + 4] == b"PK\1\2":
        entries.append(at)
        at += 46 + sum(struct.unpack_from("<HHH", whole, at + 28))
    local = [struct.unpack_from("<I", whole, entry + 42)[0] for entry in entries]

    def patched(*patches: tuple[int, str, int]) -> bytes:
        content = bytearray(whole)
        for at, form, value in patches:
            struct.pack_into("<" + form, content, at, value)
        return bytes(content)

    def case(label: str, content: bytes, *says: str, outcome: str = REFUSED) -> Case:
        return Case(f"zip/{label}", "bin", {name: content}, outcome, (name, *says))

    yield case("prepended", b"#!/bin/sh\n" + whole)
    yield case("prepended-zeros", bytes(64) + whole)
    yield case("prepended-zip", whole + whole)
    yield case("appended", whole + bytes(8))
    yield case("comment", whole[:-2] + b"\5\0hello")
    yield case("comment-with-another-end", whole[:-2] + struct.pack("<H", 22) + whole[end:])
    for field, form, values in (
        (4, "H", (1, 0xFFFF)),
        (6, "H", (1,)),
        (8, "H", (0, 1, 0xFFFF)),
        (10, "H", (0, 1, 0xFFFF)),
        (12, "I", (0, 1, 2**32 - 1)),
        (16, "I", (0, directory + 46, len(whole), 2**32 - 1)),
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
            (42, "I", (0, 1, local[1], directory, end, len(whole), 2**32 - 1)),
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
        size = struct.unpack_from("<I", whole, entry + 24)[0] + 200
        grown = [(at, "I", size) for at in (entry + 20, entry + 24, header + 18, header + 22)]
        yield case(f"both{which}-overlap-the-next", patched(*grown), "overlaps")
    yield case("pickle-crc", patched((entries[0] + 16, "I", 1)), "checksum")
    yield case("no-crc", patched(*[(entry + 16, "I", 0) for entry in entries]), outcome=HARMLESS)
    sizes = [(at, "I", 2**32 - 1) for at in (entries[3] + 20, entries[3] + 24)]
    yield case("zip64-without-numbers", patched(*sizes))
    yield case("two-records-are-one", patched((entries[4] + 42, "I", local[3])))
    twice = whole[directory : entries[1]]
    longer = whole[:end] + twice + whole[end:]
    more = struct.pack("<HHI", len(entries) + 1, len(entries) + 1, end - directory + len(twice))
    yield case("record-twice", longer[: end + len(twice) + 8] + more + longer[end + len(twice) + 16 :], "twice")
    for bit in random.Random(2).sample(range(directory * 8, len(whole) * 8), 40):
        yield Case(f"zip/directory-bit{bit}", "bin", {name: flip(whole, bit)}, EITHER)
