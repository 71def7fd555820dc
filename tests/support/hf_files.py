"""Writes small Hugging Face OPT checkpoints without torch, for tests. Not a test itself.

HF's names and shapes are written out here, so that a mistake in `formats/names.py` shows.
"""

import io
import json
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import serialization, traverse_util
from safetensors.numpy import save_file

TINY = dict(
    model_type="opt",
    architectures=["OPTForCausalLM"],
    vocab_size=48,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=16,
    num_attention_heads=2,
    max_position_embeddings=16,
    word_embed_proj_dim=8,
)
VARIANTS = {
    "125m": TINY,
    "350m": TINY | dict(do_layer_norm_before=False, word_embed_proj_dim=4),
    "galactica": TINY | dict(activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False),
    "untied": TINY | dict(tie_word_embeddings=False),
    "no-final-norm": TINY | dict(_remove_final_layer_norm=True),
}
_FILES = {
    "safetensors": ("model", ".safetensors"),
    "bin": ("pytorch_model", ".bin"),
    "flax": ("flax_model", ".msgpack"),
}
_STORAGES = {
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "int8": "CharStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
}


def hf_shapes(config: dict, head: str = "lm_head") -> dict[str, tuple[int, ...]]:
    """HF name -> shape. `head`: "lm_head", "score", "qa_outputs", or "" for a base model, without `model.` in names."""
    width, ffn, embed = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    bias, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.embed_tokens.weight": (config["vocab_size"], embed),
        "decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, width),
    }
    if embed != width:
        shapes |= {"decoder.project_in.weight": (width, embed), "decoder.project_out.weight": (embed, width)}
    norms = []
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        norms.append("decoder.final_layer_norm")
    for i in range(config["num_hidden_layers"]):
        layer = f"decoder.layers.{i}"
        linears = {f"self_attn.{p}_proj": (width, width) for p in ("k", "v", "q", "out")}
        linears |= {"fc1": (ffn, width), "fc2": (width, ffn)}
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if bias:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    for norm in norms if affine else []:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if head:
        shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    if head == "lm_head" and not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], embed)
    if head == "score":
        shapes["score.weight"] = (config.get("num_labels", 2), embed)
    if head == "qa_outputs":
        shapes |= {"qa_outputs.weight": (2, embed), "qa_outputs.bias": (2,)}
    return shapes


def hf_weights(config: dict, head: str = "lm_head", dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors, all different."""
    rng = np.random.default_rng(0)
    kind = getattr(ml_dtypes, dtype, dtype)
    return {name: rng.standard_normal(shape).astype(kind) for name, shape in hf_shapes(config, head).items()}


def write_hf(directory: Path, config: dict, weights: dict[str, np.ndarray], form: str = "safetensors") -> Path:
    """Write a checkpoint. `form`: "safetensors", "bin" or "flax", with "-sharded" for two files and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    stem, suffix = _FILES[form.removesuffix("-sharded")]
    weights = flax_arrays(weights) if suffix == ".msgpack" else weights
    names = list(weights)
    if not form.endswith("-sharded"):
        shards = {stem + suffix: names}
    else:
        half = len(names) // 2
        shards = {f"{stem}-0000{i + 1}-of-00002{suffix}": part for i, part in enumerate((names[:half], names[half:]))}
        index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    for file, part in shards.items():
        tensors = {name: np.ascontiguousarray(weights[name]) for name in part}
        if suffix == ".safetensors":
            save_file(tensors, directory / file)
        elif suffix == ".msgpack":
            tree = traverse_util.unflatten_dict(tensors, sep="/")
            (directory / file).write_bytes(serialization.msgpack_serialize(tree))
        else:
            torch_zip(directory / file, state_dict_pickle(tensors), {n: a.tobytes() for n, a in tensors.items()})
    return directory


def flax_arrays(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names, and in the orientation, of transformers 4's FlaxOPT classes."""
    arrays = {}
    for name, array in weights.items():
        path, _, last = name.replace(".", "/").rpartition("/")
        embedding, norm = "embed_" in path, path.endswith("norm")
        last = last if last != "weight" else "embedding" if embedding else "scale" if norm else "kernel"
        arrays[f"{path}/{last}"] = array.T if last == "kernel" else array
    return arrays


# torch.save's format, written by hand, so that tests can write hostile and damaged files ------------------------------


def torch_zip(path: Path, data_pkl: bytes, storages: dict[str, bytes], byteorder: str = "little", **kwargs) -> None:
    """Write a file as `torch.save` does: the extra field of local headers aligns records to 64 bytes."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", **kwargs) as archive:
        records = {"data.pkl": data_pkl, "byteorder": byteorder.encode()}
        for name, data in (records | {f"data/{key}": data for key, data in storages.items()}).items():
            info = zipfile.ZipInfo(f"archive/{name}")
            info.compress_type = archive.compression
            padding = -(raw.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, data)
            info.extra = b""  # the central directory lacks the extra field
    path.write_bytes(raw.getvalue())


def state_dict_pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """The pickle of an OrderedDict of contiguous tensors. Each has its own storage, of its name."""
    items = b"".join(_text(name) + tensor_pickle(name, a.dtype.name, a.size, 0, a.shape) for name, a in tensors.items())
    metadata = b"}" + _text("_metadata") + b"}" + b"s"  # state_dict() has this attribute
    return b"\x80\x02" + _ORDERED_DICT + b"(" + items + b"u" + metadata + b"b."


def tensor_pickle(key: str, dtype: str, numel: int, offset: int, shape, strides=None) -> bytes:
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = b"(" + _text("storage") + global_(f"torch {_STORAGES[dtype]}") + _text(key) + _text("cpu") + _int(numel)
    storage += b"tQ"
    arguments = _int(offset) + _ints(shape) + _ints(strides) + b"\x89" + _ORDERED_DICT
    return global_("torch._utils _rebuild_tensor_v2") + b"(" + storage + arguments + b"tR"


def global_(module_and_name: str) -> bytes:
    return b"c" + module_and_name.replace(" ", "\n").encode() + b"\n"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(n: int) -> bytes:
    return b"I%d\n" % n


def _ints(values) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


_ORDERED_DICT = global_("collections OrderedDict") + b")R"
