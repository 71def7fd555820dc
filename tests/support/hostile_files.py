"""Hundreds of damaged and malicious checkpoints, as changes to small valid ones. Not a test itself.

Every generator is deterministic. A case is data: the new content of files of a valid checkpoint.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.hf_files import VARIANTS

CONFIG = VARIANTS["galactica"] | {"num_hidden_layers": 1}  # 8 tensors, the fewest of any model
FC1 = "model.decoder.layers.0.fc1.weight"  # the tensor that is damaged
EMBED = "model.decoder.embed_tokens.weight"
REFUSED, HARMLESS, EITHER = "refused", "harmless", "either"


@dataclass(frozen=True)
class Case:
    """A changed checkpoint, and what must come of it.

    Attributes:
      name: of the case.
      form: the valid checkpoint that is changed.
      changes: file -> new content, None (the file is removed), or the target of a link.
      outcome: REFUSED, HARMLESS (the conversion succeeds) or EITHER.
      says: parts of the error's text, besides the directory.
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
