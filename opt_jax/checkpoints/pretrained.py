"""Loads models from Orbax and Hugging Face directories.

A model directory of ours holds `config.json` (in HF's format), the tokenizer's files, and `params/`. The latter is an
Orbax pytree, nested by the parts of `named_parameters`' paths, with one array per layer and parameter, in the dtype of
its source. `saving.py` writes it.
"""

import dataclasses
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opt_jax.checkpoints import hf_scripts, hub, quantized_layers
from opt_jax.checkpoints.arrays import Checks, LazyArray, empty
from opt_jax.checkpoints.chunks import Shape
from opt_jax.checkpoints.formats import config_json, hf, names, peft, quantized
from opt_jax.checkpoints.orbax import open_arrays
from opt_jax.checkpoints.source_files import files_of_model
from opt_jax.config import OPTConfig
from opt_jax.model.flash import AttentionImplementation
from opt_jax.model.heads import OPTForCausalLM, OPTPreTrainedModel, named_parameters
from opt_jax.model.remat import Remat
from opt_jax.model.stacking import stack_layers, unstack_layers
from opt_jax.parallel import rules
from opt_jax.parallel.agreement import on_every_process, on_first_process
from opt_jax.parallel.mesh import turn_cache_off
from opt_jax.system.messages import shown
from opt_jax.system.reading import note_without_effect, read_small

M = TypeVar("M", bound=OPTPreTrainedModel)
log = logging.getLogger(__name__)

PARAM_DTYPES = ("float32", "bfloat16", "float16")
_READERS = 2  # number of arrays that are read at the same time
_STORED_DTYPES = (*PARAM_DTYPES, "float64")
_LAYER = ".layers.0."
_LARGEST_NEW_HEAD = 10  # times what is stored
_HEADS = ("lm_head.", "score.", "qa_outputs.")


def load_pretrained(  # noqa: PLR0913  (options, by keyword)
    cls: type[M],
    name: str | os.PathLike,
    *,
    config: OPTConfig | str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    scan_layers: bool = False,
    remat: Remat = "none",
    attn_implementation: AttentionImplementation = "xla",
    mesh: Mesh | None = None,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    verify: bool = True,
    adapter: str | os.PathLike | None = None,
    merge_adapter: bool = True,
    dequantize: bool = False,
    **fields: Any,
) -> M:
    """A model of class `cls` from an Orbax or a Hugging Face directory.

    A classification or QA head that the checkpoint lacks is newly initialised, and a head that `cls` lacks is ignored;
    both are logged. Any other missing, left-over or misshapen tensor is an error.

    Args:
      cls: the class of the model.
      name: what `hub.resolve` takes: a directory, a hub id or "tiny".
      config: an OPTConfig, or a name for `OPTConfig.from_pretrained`; default: that of the checkpoint.
      dtype: of the computation and of the parameters; "auto": as stored. Default: float32 on CPU, else as stored, but
        bfloat16 for float16 on TPU (logged).
      param_dtype: of the parameters, where it differs from `dtype`.
      scan_layers, remat, attn_implementation: see `OPTPreTrainedModel`.
      mesh: shard the parameters over it, as `rules.param_spec` says. Each process reads its own shards only.
      ignore_mismatched_sizes: newly initialise a parameter whose shape in the checkpoint is another one (logged).
      output_loading_info: return the model and a dict with `missing_keys`, `unexpected_keys`, `mismatched_keys` (name,
        shape in the checkpoint, shape in the model) and `error_msgs`, under the checkpoint's names.
      revision: of the model, not of an adapter; see `hub.resolve`.
      cache_dir, local_files_only: see `hub.resolve`.
      verify: compare the chunks of an Orbax directory with their checksums. False reads damaged chunks as they are.
      adapter: a PEFT adapter (LoRA) for the model: a directory, which may be in an object store, or a hub id.
      merge_adapter: False keeps the adapter's matrices as parameters of their own, as `lora.LoRA` does (needs qwix).
        They can be trained, and `save_pretrained` then writes a PEFT adapter: them, and the head of a task.
      dequantize: make a model of floats of a quantized checkpoint. Default: its matrices stay integers in memory, with
        scales in float32; `param_dtype` is that of the other parameters.
      **fields: fields of the config that differ from the checkpoint's: `num_labels=5`, `dropout=0.0`, `id2label=...`

    Raises:
      FileNotFoundError: no such model, or an incomplete one.
      ImportError: qwix is not installed (`merge_adapter=False`).
      ValueError: a bad config or checkpoint, a checkpoint that changed while it was read, a dtype that is not floating
        point, an argument that does not exist (for one of `transformers` it says what to write instead), or
        `verify=False` for a model without checksums.
    """
    fields = hf_scripts.known("from_pretrained", fields, hf_scripts.LOADING)
    hf_scripts.check_attention(attn_implementation)
    directory = hub.resolve(name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    if not (verify or hub.is_orbax(directory)):
        raise ValueError(f"verify=False (--no-verify) is for Orbax directories: {directory} has no checksums")
    files = files_of_model(directory)
    config = _config_of(directory, config, fields)
    arrays, checks = open_parameters(directory, config, verify)
    stored = {path: array.dtype for path, array in arrays.items()}
    if dequantize:
        arrays, config = quantized.dequantized(arrays, config, "float32", directory)
    reason = "an adapter" if adapter is not None else "a stack of layers (scan_layers, training)"
    reason = reason if adapter is not None or scan_layers else None
    quantized.refuse(arrays, directory, reason, "pass dequantize=True, or convert it with --dequantize")
    opened = None
    if adapter is not None:
        place = hub.resolve_adapter(adapter, cache_dir=cache_dir, local_files_only=local_files_only)
        files.add(peft.files_of_adapter(place))
        opened = peft.open_adapter(place)
        how: Any = dict(causal=issubclass(cls, OPTForCausalLM), merge=merge_adapter, dtype="float32")
        arrays, config = opened.onto(arrays, config, directory, **how)
        checks = (*checks, *opened.notes)
    elif not merge_adapter:
        raise ValueError("merge_adapter=False is for an adapter: name it with adapter=")

    # A causal LM may neither lose a stored lm_head nor get a random one.
    may_drop = [head for head in _HEADS if not (head == "lm_head." and issubclass(cls, OPTForCausalLM))]
    expected, fresh, dropped = check_parameters(
        cls,
        config,
        arrays,
        directory,
        may_lack=("score.", "qa_outputs."),
        may_drop=may_drop,
        may_differ=ignore_mismatched_sizes,
        stored_as=_stored_as(directory),
    )
    info = _report(cls, directory, arrays, expected, fresh, dropped)

    for check in checks:  # in a job one process checks, because the others read only their shards
        check() if mesh is None else on_first_process(check)

    if mesh is not None:
        turn_cache_off(list(mesh.devices.flat))
    default = jnp.zeros(()).sharding  # honours jax.default_device
    platform = next(iter(default.device_set)).platform if mesh is None else mesh.devices.flat[0].platform
    stored = {path: stored.get(path, stored[names.EMBEDDING]) for path in arrays if path in expected}
    compute, dtypes = choose_dtypes(dtype, param_dtype, stored, platform, directory)
    options: Any = dict(dtype=compute, attn_implementation=attn_implementation, remat=remat)
    model: Any = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), param_dtype=dtypes[names.EMBEDDING], **options))
    if opened is not None and not merge_adapter:
        lora = opened.lora(config.num_hidden_layers)
        model = unstack_layers(lora.adapt(stack_layers(model)))
        model.lora = lora  # for `save_pretrained`
        kept = opened.kept()
        arrays, expected = arrays | kept, expected | {path: array.shape for path, array in kept.items()}
        dtypes |= {path: dtypes[path.rpartition("_lora_")[0]] for path in kept}
    targets = {
        path: jax.ShapeDtypeStruct(
            shape,
            dtypes.get(path, dtypes[names.EMBEDDING]),
            sharding=default if mesh is None else rules.param_sharding(path, shape, mesh),
        )
        for path, shape in expected.items()
    }
    _fill(model, arrays, targets, fresh, mesh)
    model.name_or_path = str(directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config_json = read_small(directory / "generation_config.json").decode("utf-8", "replace")
    files.check() if mesh is None else on_every_process(files.check)
    if scan_layers:
        model = stack_layers(model)
    return cast(Any, (model, info)) if output_loading_info else model


def _fill(
    model: OPTPreTrainedModel,
    arrays: Mapping[str, LazyArray],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    fresh: Sequence[str],
    mesh: Mesh | None,
) -> None:
    """Give the parameters of an abstract model the values of `arrays`, or new ones, with the shardings of `targets`."""
    params, integers = named_parameters(model), quantized.quantized_of(arrays)
    stored = [path for path in targets if path not in fresh and path not in integers]
    with ThreadPoolExecutor(_READERS) as pool:
        reading = pool.map(lambda path: read_array(arrays[path], targets[path]), stored)
        for path, array in zip(stored, reading, strict=True):
            params[path].set_value(array)
    if fresh:
        for path, array in _initialise(type(model), model.config, {path: targets[path] for path in fresh}).items():
            params[path].set_value(array)
    for path in integers.keys() & targets.keys() - set(fresh):
        quantized_layers.place(model, path, integers[path], read_array, mesh)


def _report(
    cls: type[OPTPreTrainedModel],
    directory: Path,
    arrays: Mapping[str, LazyArray],
    expected: Mapping[str, Shape],
    fresh: Sequence[str],
    dropped: Sequence[str],
) -> dict[str, Any]:
    """Log what is newly initialised and what is not used; the dict of `output_loading_info`."""
    for path in fresh:
        what = f"{path} of shape {arrays[path].shape}" if path in arrays else f"no {path}"
        log.warning("%s has %s: newly initialised. Train it before use.", directory, what)
    for path in dropped:
        log.warning("%s: %s is not used by %s", directory, path, cls.__name__)
    stored_as = _stored_as(directory)
    differing = [path for path in fresh if path in arrays]
    return {
        "missing_keys": {stored_as(path, ())[0] for path in fresh if path not in arrays},
        "unexpected_keys": {stored_as(path, ())[0] for path in dropped},
        "mismatched_keys": {
            (*stored_as(path, arrays[path].shape), stored_as(path, expected[path])[1]) for path in differing
        },
        "error_msgs": [],
    }


def _config_of(directory: Path, config: Any, fields: Mapping[str, Any]) -> OPTConfig:
    """The checkpoint's config, or the given one, with other values of fields."""
    if config is None:
        config, _ = read_config(directory)
    elif isinstance(config, (str, os.PathLike)):
        config = config_json.from_pretrained(OPTConfig, config)
    elif not isinstance(config, OPTConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise ValueError(f"config must be an opt_jax.OPTConfig, not a {kind}: use OPTConfig.from_hf(config.to_dict())")
    return config_json.override(config, fields, inspect.signature(load_pretrained).parameters)


def expected_shapes(cls: type[OPTPreTrainedModel], config: OPTConfig) -> Iterator[tuple[str, Shape]]:
    """(path, shape) of every parameter of the unstacked model. Only one layer is traced."""
    shapes = _shapes_of_one_layer(cls, dataclasses.replace(config, num_hidden_layers=1))
    for i in range(config.num_hidden_layers):
        yield from ((path.replace(_LAYER, f".layers.{i}.", 1), shapes[path]) for path in shapes if _LAYER in path)
    yield from ((path, shapes[path]) for path in shapes if _LAYER not in path)


@lru_cache(maxsize=16)  # tracing takes 0.1 s; a conversion calls this twice, a notebook often
def _shapes_of_one_layer(cls: type[OPTPreTrainedModel], config: OPTConfig) -> dict[str, Shape]:
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    return {path: param.get_value().shape for path, param in named_parameters(model).items()}


def check_parameters(
    cls: type[OPTPreTrainedModel],
    config: OPTConfig,
    arrays: Mapping[str, LazyArray],
    where: str | os.PathLike,
    *,
    may_lack=(),
    may_drop=(),
    may_differ: bool | None = None,
    stored_as: Callable[[str, Shape], tuple[str, Shape]] = lambda path, shape: (path, shape),
) -> tuple[dict[str, Shape], list[str], list[str]]:
    """Compare a checkpoint's parameters with the model's.

    Args:
      cls, config: the model.
      arrays: the checkpoint's parameters, path -> array.
      where: the checkpoint, for messages.
      may_lack: prefixes of heads that may be missing, all parameters of a head together.
      may_drop: prefixes of heads that may be left over.
      may_differ: whether parameters may have other shapes; they then count as missing. None: no, and the message does
        not offer it.
      stored_as: our path and shape -> name and shape in the checkpoint, for messages.

    Returns:
      The model's parameters, path -> shape; the paths that are missing; the paths that are left over.

    Raises:
      ValueError: a tensor is missing, left over, has another shape or is not floating point; the message names it.
    """
    for path, array in arrays.items():
        if array.dtype.name not in _STORED_DTYPES:
            what = f"tensor {stored_as(path, ())[0]} is {array.dtype.name}, which no weight of a model is"
            raise ValueError(f"{where}: {what}{hub.quantization_hint(where)}")
    if config.num_hidden_layers > len(arrays):
        raise ValueError(
            f"{where}: there are only {len(arrays)} tensors, but the config calls for {config.num_hidden_layers} layers"
        )
    stored_shapes = {path: array.shape for path, array in arrays.items()}
    lacking = tuple(head for head in may_lack if not any(path.startswith(head) for path in stored_shapes))
    expected, fresh = {}, []
    for path, shape in expected_shapes(cls, config):  # stops at the first that is missing, for configs of many layers
        expected[path] = shape
        if path not in stored_shapes or may_differ and stored_shapes[path] != shape:
            fresh.append(path)
            if path not in stored_shapes and not path.startswith(lacking):
                raise ValueError(f"{where}: tensor {stored_as(path, ())[0]} is missing, which the config calls for")
    size = sum(math.prod(expected[path]) for path in fresh)
    stored = sum(map(math.prod, stored_shapes.values()))
    if size > _LARGEST_NEW_HEAD * stored + (1 << 24):
        raise ValueError(
            f"{where}: a new head of shape {expected[fresh[0]]}, with num_labels={config.num_labels}, is more than "
            f"{_LARGEST_NEW_HEAD} times as large as all that is in the checkpoint"
        )
    dropped = [path for path in stored_shapes if path not in expected]
    for path in dropped:
        if not path.startswith(tuple(may_drop)):
            raise ValueError(f"{where}: tensor {stored_as(path, ())[0]} is left over: the config has no place for it")
    for path, shape in expected.items():
        if path not in fresh and stored_shapes[path] != shape:
            (label, got), (_, want) = stored_as(path, stored_shapes[path]), stored_as(path, shape)
            hint = "" if may_differ is None else " (ignore_mismatched_sizes=True initialises it anew)"
            raise ValueError(f"{where}: tensor {label} has shape {got}, but the config calls for {want}{hint}")
    if not quantized.quantized_of(arrays):
        note_without_effect(where, config.extra, {"quantization_config": ((), "no weight is quantized")})
    return expected, fresh, dropped


def choose_dtypes(
    dtype: DTypeLike | None, param_dtype: DTypeLike | None, stored: Mapping[str, np.dtype], platform: str, where: Path
) -> tuple[np.dtype, dict[str, np.dtype]]:
    """(dtype of the computation, dtype of each parameter) by the rule of `load_pretrained`."""

    def choose(asked: DTypeLike | None, stored: np.dtype) -> np.dtype:
        if asked is None and platform == "cpu":
            asked = jnp.float32
        if asked is None and platform == "tpu" and stored == jnp.float16:
            asked = jnp.bfloat16
        try:
            chosen = jnp.dtype(stored if asked is None or isinstance(asked, str) and asked == "auto" else asked)
        except TypeError:  # torch.float16, "fp16"
            chosen = asked
        if getattr(chosen, "name", None) not in PARAM_DTYPES:
            raise ValueError(f"{where}: {shown(chosen)} is not a dtype for models ({', '.join(PARAM_DTYPES)})")
        return cast(np.dtype, chosen)

    param_dtype = dtype if param_dtype is None else param_dtype
    chosen = choose(dtype, stored[names.EMBEDDING]), {path: choose(param_dtype, dt) for path, dt in stored.items()}
    if (
        platform == "tpu"
        and stored[names.EMBEDDING] == jnp.float16
        and jnp.bfloat16 in (chosen[0], chosen[1][names.EMBEDDING])
    ):
        log.info("%s is stored as float16; on TPU it is used as bfloat16", where)
    return chosen


def _initialise(
    cls: type[OPTPreTrainedModel], config: OPTConfig, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """New values for the parameters `targets`; the compiler removes the computation of all others."""

    def init() -> dict[str, jax.Array]:
        params = named_parameters(cls(config, rngs=nnx.Rngs(0)))
        return {path: params[path].get_value().astype(target.dtype) for path, target in targets.items()}

    return jax.jit(init, out_shardings={path: target.sharding for path, target in targets.items()})()


def read_config(directory: Path) -> tuple[OPTConfig, dict[str, Any]]:
    """(configuration, content of the config.json) of a model directory, as `hub.resolve` returns it.

    Raises:
      FileNotFoundError, ValueError: as `hub.read_config` and `OPTConfig.from_hf`.
    """
    raw = hub.read_config(directory)
    return OPTConfig.from_hf(raw, where=str(directory / "config.json")), raw


def open_parameters(directory: Path, config: OPTConfig, verify: bool = True) -> tuple[dict[str, LazyArray], Checks]:
    """Parameter path -> array, and comparisons to run before using the arrays (`formats.hf.open_parameters`).

    Args:
      directory: an Orbax model directory, a checkpoint of train.py or a Hugging Face directory.
      config: its configuration.
      verify: see `load_pretrained`.

    Raises:
      ValueError: the directory holds LoRA adapters only; or see `open_arrays` and `formats.hf.open_parameters`.
    """
    if hub.is_orbax(directory):
        arrays = open_arrays(directory / "params", verify)
        if any(path.startswith("model.model.") for path in arrays):  # a training state, whose field `model` this is
            arrays = {path.removeprefix("model."): array for path, array in arrays.items()}
        if any(path.endswith("_lora_a") for path in arrays):
            raise ValueError(
                f"{directory} holds the adapters of a run with --lora-rank, without the model that they belong to: let "
                "the run finish, whose model/ has them merged in"
            )
        arrays = quantized.gather(arrays, directory, config, hub.quantization(directory)[2])
        return arrays, quantized.checks_of(arrays, directory)
    return hf.open_parameters(directory, config)


def _stored_as(directory: Path) -> Callable[[str, Shape], tuple[str, Shape]]:
    """Our path and shape -> name and shape in the checkpoint, for messages."""
    if hub.is_orbax(directory):
        return lambda path, shape: (path, shape)
    return hf.stored_as


def read_array(lazy: LazyArray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """The array in the sharding and dtype of `target`. This process reads only the shards of its devices, each once."""
    parts: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key in parts:
            return parts[key].copy()  # for another replica, because JAX may donate a buffer
        values = lazy.load(index)
        if values.dtype != target.dtype:
            stored, values = values, empty(values.shape, target.dtype)
            values[...] = stored
        parts[key] = values
        return values

    return jax.make_array_from_callback(target.shape, target.sharding, part)
