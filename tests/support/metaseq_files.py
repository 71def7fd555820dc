"""Writes small metaseq checkpoints without torch, for tests. Not a test itself.

metaseq's names, joins and layouts are written out here a second time, so that a mistake in `convert.metaseq` shows.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.hf_files import global_, tensor_pickle, torch_zip


@dataclass(frozen=True, eq=False)
class Foreign:
    """An object of a class that is not installed.

    Attributes:
      name: of its class, "module name".
      args: of its constructor.
      state: what unpickling sets, or None.
    """

    name: str
    args: tuple = ()
    state: Any = None


def settings(config: dict, **changes) -> dict[str, Any]:
    """metaseq's settings of a model, from HF's config. Changes to None remove a setting."""
    values = dict(
        decoder_layers=config["num_hidden_layers"],
        decoder_embed_dim=config["hidden_size"],
        decoder_ffn_embed_dim=config["ffn_dim"],
        decoder_attention_heads=config["num_attention_heads"],
        decoder_input_dim=config["word_embed_proj_dim"],
        decoder_output_dim=config["word_embed_proj_dim"],
        max_target_positions=config["max_position_embeddings"],
        activation_fn="relu",
        decoder_normalize_before=config.get("do_layer_norm_before", True),
        share_decoder_input_output_embed=True,
        no_scale_embedding=True,
        decoder_learned_pos=True,
        dropout=0.1,
        attention_dropout=0.0,
        disable_bias=not config.get("enable_bias", True),
        disable_affine_ln=not config.get("layer_norm_elementwise_affine", True),
    )
    return {name: value for name, value in (values | changes).items() if value is not None}


def namespace(values: dict) -> Foreign:
    return Foreign("argparse Namespace", state=values)


def omega(values: dict) -> Foreign:
    """A config as omegaconf 2.1 pickles it: nodes with types and with references to their parent."""
    metadata = Foreign("omegaconf.base ContainerMetadata", state={"ref_type": dict, "key": None, "flags": {}})
    content = {
        key: omega(value)
        if isinstance(value, dict)
        else Foreign("omegaconf.nodes AnyNode", state={"_metadata": metadata, "_parent": None, "_val": value})
        for key, value in values.items()
    }
    return Foreign("omegaconf.dictconfig DictConfig", state={"_metadata": metadata, "_content": content})


# The tensors ------------------------------------------------------------------------------------------------


def part_of(weights: dict[str, np.ndarray], part: int, parts: int, fused: bool = True) -> dict[str, np.ndarray]:
    """metaseq name -> tensor of one model-parallel part. `weights` are those of HF's causal LM."""
    tensors: dict[str, np.ndarray] = {"decoder.version": np.array([3.0], next(iter(weights.values())).dtype)}
    for name, array in weights.items():
        name = name.removeprefix("model.")
        for hf, metaseq in (
            ("decoder.final_layer_norm", "decoder.layer_norm"),
            ("project_in", "project_in_dim"),
            ("project_out", "project_out_dim"),
        ):
            name = name.replace(hf, metaseq)
        if any(f".{kind}." in name for kind in ("embed_tokens", "fc1", "k_proj", "v_proj", "q_proj")):
            array = np.split(array, parts, 0)[part]
        elif name.endswith(("fc2.weight", "out_proj.weight")):
            array = np.split(array, parts, 1)[part]
        tensors[name] = np.ascontiguousarray(array)
    return fuse(tensors) if fused else tensors


def fuse(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    fused = {}
    for name, array in tensors.items():
        if ".k_proj." in name:
            rows = [tensors[name.replace("k_proj", f"{letter}_proj")] for letter in "kvq"]
            fused[name.replace("k_proj", "qkv_proj")] = np.concatenate(rows)
        elif ".v_proj." not in name and ".q_proj." not in name:
            fused[name] = array
    return fused


LAYER = [
    f"{module}.{kind}"
    for module in ("self_attn.qkv_proj", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
    for kind in ("weight", "bias")
]


def units(tensors: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Path of each FSDP unit -> names of its tensors within the unit, in order."""
    layers = sorted({int(name.split(".")[2]) for name in tensors if ".layers." in name})
    root = ["embed_tokens.weight", "embed_positions.weight", "layer_norm.weight", "layer_norm.bias"]
    names_of_units = {"": [f"decoder.{name}" for name in root if f"decoder.{name}" in tensors]}
    for i in layers:
        prefix = f"decoder.layers.{i}"
        separate = sorted(n.removeprefix(f"{prefix}.") for n in tensors if n.startswith(f"{prefix}."))
        fused = [name for name in LAYER if f"{prefix}.{name}" in tensors]
        names_of_units[prefix] = fused if len(fused) == len(separate) else separate
    return names_of_units


def flatten(tensors: dict[str, np.ndarray], shards: int) -> list[tuple[dict, dict]]:
    """(model, shard_metadata) of each FSDP shard of a part."""
    models: list[dict] = [{} for _ in range(shards)]
    metadata: list[dict] = [{"param_metadata": [], "buffer_names": ["decoder.version"]} for _ in range(shards)]
    for path, names in units(tensors).items():
        dot = f"{path}." if path else ""
        arrays = [tensors[dot + name] for name in names]
        flat = np.concatenate([array.ravel() for array in arrays])
        size = -(-flat.size // shards)
        for i in range(shards):
            piece = flat[i * size : (i + 1) * size]
            padding = size - piece.size
            models[i][f"{dot}flat_param_0"] = np.concatenate([piece, np.full(padding, 7, flat.dtype)])
            info = dict(
                names=names,
                shapes=[array.shape for array in arrays],
                numels=[array.size for array in arrays],
                padding=padding,
            )
            metadata[i]["param_metadata"].append(
                dict(
                    fsdp_path=path,
                    params={"flat_param_0": info},
                    no_broadcast_optim_state=False,
                    shared_param_info=[(names[0], "decoder.output_projection.weight")],
                )
            )
    for model in models:
        model["decoder.version"] = tensors["decoder.version"]
    return list(zip(models, metadata, strict=True))


def contents(
    weights: dict[str, np.ndarray],
    parts: int | None = None,
    shards: int | None = None,
    flat: bool = False,
    metadata: bool = True,
    fused: bool = True,
    **entries,
) -> dict[str, dict[str, Any]]:
    """File name -> content, with arrays for tensors.

    Args:
      weights: of HF's causal LM.
      parts: number of model-parallel parts. None: one, without a number in the file's name.
      shards: number of FSDP shards, likewise.
      flat: whether tensors are flattened by FSDP.
      metadata: whether files have `shard_metadata`.
      fused: whether query, key and value are one tensor.
      entries: further entries of each file. Those that are None are left out.
    """
    files = {}
    for part in range(parts or 1):
        tensors = part_of(weights, part, parts or 1, fused)
        for shard, (model, shard_metadata) in enumerate(flatten(tensors, shards or 1)):
            name = "reshard" + (f"-model_part-{part}" if parts else "") + (f"-shard{shard}" if shards else "") + ".pt"
            content = dict(model=model if flat else tensors, shard_metadata=shard_metadata if metadata else None)
            content |= {"last_optimizer_state": {"state": {0: {"step": 7, "exp_avg": np.ones(3, np.float32)}}}}
            content |= {"extra_state": {"meters": Foreign("metaseq.logging.meters AverageMeter", state={"sum": 1.5})}}
            files[name] = {key: value for key, value in (content | entries).items() if value is not None}
    return files


# The files --------------------------------------------------------------------------------------------------


def write(directory: Path, files: dict[str, dict[str, Any]]) -> list[Path]:
    """Write the files as torch.save does. Returns their paths in random order, because it must not matter."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        storages: dict[str, bytes] = {}
        torch_zip(directory / name, b"\x80\x02" + encode(content, storages) + b".", storages)
    paths = [directory / name for name in files]
    return [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]


def encode(value: Any, storages: dict[str, bytes]) -> bytes:
    """Pickle opcodes for the value. The bytes of tensors are added to `storages`."""
    if isinstance(value, np.ndarray):
        key = str(len(storages))
        storages[key] = value.tobytes()
        return tensor_pickle(key, value.dtype.name, value.size, 0, value.shape)
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(part, storages) for item in value.items() for part in item) + b"u"
    if isinstance(value, (list, tuple)):
        items = b"(" + b"".join(encode(part, storages) for part in value)
        return b"](" + items[1:] + b"e" if isinstance(value, list) else items + b"t"
    if isinstance(value, Foreign):
        constructed = global_(value.name) + encode(value.args, storages) + (b"R" if value.args else b"\x81")
        return constructed if value.state is None else constructed + encode(value.state, storages) + b"b"
    if isinstance(value, type):
        return global_(f"__builtin__ {value.__name__}")
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
