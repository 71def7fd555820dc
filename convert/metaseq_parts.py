"""Opens one model-parallel part of a metaseq checkpoint, and joins the tensors in its FSDP shards, lazily.

No file stays open, since there may be 992: a read opens its file, reads the bytes that it needs and closes it.

Sources: fairscale's FullyShardedDataParallel.local_metadata_dict and _get_shard; metaseq's scripts/reshard_fsdp.py.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints.arrays import LazyArray, first_difference
from opt_jax.checkpoints.chunks import Index, Shape
from opt_jax.checkpoints.formats.mapped_files import shown
from opt_jax.checkpoints.formats.stored import Stored, locate
from opt_jax.checkpoints.formats.torch_files import TorchFile, TorchTensor
from opt_jax.checkpoints.formats.unpickle import Stub
from opt_jax.config import OPTConfig

from .metaseq_config import TRAINING, read_settings

EMBEDDING = "decoder.embed_tokens.weight"

# Reading files ----------------------------------------------------------------------------------------------

_COMPARED = (4096, 16)  # `check_copies` hashes so many elements of a vector, or rows of a matrix
_Unit = tuple[tuple[str, Shape], ...]  # names and shapes of the tensors in a flat parameter, in order


@dataclass
class Part:
    """The files of one model-parallel part.

    Attributes:
      paths: the files, one for each shard.
      stored: maps the name of a tensor to its place in each file.
      units: maps the name of a flat parameter to the tensors in it. None: the files have no metadata.
      padding: maps the name of a flat parameter to the number of padding elements at the end of each shard.
      settings: see `metaseq_config.read_settings`.
    """

    paths: Sequence[Path]
    stored: dict[str, list[Stored]]
    units: dict[str, _Unit] | None
    padding: dict[str, list[int]] = field(default_factory=dict)
    settings: dict[str, Any] | None = None


def is_flat(name: str) -> bool:
    """True if FSDP has flattened several tensors into the one with this name."""
    return name.rpartition(".")[2].startswith("flat_param_")


def open_part(paths: Sequence[Path]) -> Part:
    """The part that consists of the files `paths`, its shards in order. No tensors are read.

    Raises:
      ValueError: a file is damaged or no metaseq checkpoint, or the files differ in tensors, settings or metadata.
    """
    part: Part | None = None
    file: TorchFile | None = None
    for path in paths:
        file = TorchFile(path, stubs=True, like=file)
        shard = _part_of(file)
        if part is None:
            part = shard
            part.paths = paths
            continue
        if different := sorted(part.stored.keys() ^ shard.stored.keys()):
            raise ValueError(f"{path}: tensor {different[0]} is in it or in {paths[0]}, but not in both")
        check_settings(path, shard.settings, paths[0], part.settings)
        if part.units != shard.units:
            raise ValueError(f"{path}: its shard_metadata are not those of {paths[0]}")
        for name, places in shard.stored.items():
            part.stored[name] += places
        for name, padding in shard.padding.items():
            part.padding[name] += padding
    assert part is not None
    return part


def check_settings(
    path: Path, settings: Mapping[str, Any] | None, first: Path, expected: Mapping[str, Any] | None
) -> None:
    """Check that the settings which both files have are equal, but for dropout rates.

    Raises:
      ValueError: they differ, so `path` and `first` are of different models.
    """
    ours, theirs = settings or {}, expected or {}
    for name in sorted((ours.keys() & theirs.keys()) - set(TRAINING)):
        if ours[name] != theirs[name] and not isinstance(ours[name], Stub):
            a, b = (shown(repr(values[name])) for values in (ours, theirs))
            raise ValueError(f"{path}: {name}={a} in its settings, but {b} in {first}: not of one checkpoint")


def check_copies(parts: Sequence[Part]) -> None:
    """Check that no file is a copy of another one, which would stand for a missing file. Reads a little of each.

    Compares the largest tensor of which each file holds a piece. Pieces of one repeated value, such as padding, do not
    count. Compares the shards within a part, and the first shards of all parts. Later shards of two parts may be
    equal: they may hold LayerNorms only, which every part repeats.

    Raises:
      ValueError: two files hold the same piece, bit for bit.
    """
    first_shards: dict[bytes, Stored] = {}
    for part in parts:
        shards: dict[bytes, Stored] = {}
        split = [stored for name, stored in part.stored.items() if is_flat(name) or name == EMBEDDING]
        for i, stored in enumerate(max(split, key=lambda files: math.prod(files[0].shape), default=[])):
            length, *others = stored.shape or (1,)
            rows = min(length, _COMPARED[len(others) > 0])
            index = (slice(0, rows), *(slice(0, n) for n in others))[: len(stored.shape)]
            values = np.ascontiguousarray(stored.read(index)).reshape(-1).view(f"u{stored.dtype.itemsize}")
            if values.size and (values != values[0]).any():
                digest = hashlib.sha256(values.tobytes()).digest()
                for known in (shards, first_shards) if i == 0 else (shards,):
                    other = known.setdefault(digest, stored)
                    if other is not stored and first_difference(stored.lazy(), other.lazy()) is None:
                        raise ValueError(
                            f"{stored.path} holds what {other.path} holds, bit for bit: one of them is a copy"
                        )


def _part_of(file: TorchFile) -> Part:
    """A part that consists of one file."""
    path, content = file.path, file.content
    model = dict.get(content, "model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise ValueError(f"{path} holds no model, so it is not a metaseq checkpoint")
    stored: dict[str, list[Stored]] = {}
    for name, value in dict.items(model):
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}, where a model has tensors")
        try:
            view = file.view(value)
        except ValueError as e:
            raise ValueError(f"{path}: tensor {name}: {e}") from None
        stored[name] = [locate(path, file.map, view)]
    part = Part([path], stored, None, settings=read_settings(content))
    # Scripts that unflatten the parameters leave the metadata in the file, so metadata alone does not mean flat ones.
    if dict.get(content, "shard_metadata") and any(map(is_flat, stored)):
        part.units = {}
        try:
            for name, unit, padding in _read_metadata(content["shard_metadata"]):
                part.units[name], part.padding[name] = unit, [padding]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path}: its shard_metadata are malformed") from None
    return part


def _read_metadata(metadata: Any) -> Iterator[tuple[str, _Unit, int]]:
    """For each flat parameter: its name, the tensors in it, and its padding in this file."""
    for entry in metadata["param_metadata"]:
        prefix = entry["fsdp_path"] + "." if entry["fsdp_path"] else ""
        for name, flat in dict.items(entry["params"]):
            unit = tuple((prefix + n, tuple(shape)) for n, shape in zip(flat["names"], flat["shapes"], strict=True))
            sizes = [math.prod(shape) for _, shape in unit]
            numbers = (flat["padding"], *(n for _, shape in unit for n in shape))
            if not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers) or list(flat["numels"]) != sizes:
                raise ValueError
            if any(len(shape) not in (1, 2) for _, shape in unit):  # no OPT model has such a tensor
                raise ValueError
            yield prefix + name, unit, flat["padding"]


# The tensors of a part --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A tensor in PyTorch's layout ([out, in]). `copy(index, out)` reads the values at `index` into `out`."""

    file: Path
    shape: Shape
    dtype: np.dtype
    copy: Callable[[Index, np.ndarray], None]

    def lazy(self) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            out = np.empty([s.stop - s.start for s in index], self.dtype)
            self.copy(index, out)
            return out

        return LazyArray(self.shape, self.dtype, read)


def _unsharded(stored: Stored) -> Source:
    return Source(stored.path, stored.shape, stored.dtype, lambda index, out: np.copyto(out, stored.read(index)))


def part_tensors(part: Part, config: OPTConfig, parts: int, checks: list[Callable[[], object]]) -> dict[str, Source]:
    """All tensors of a part, by metaseq's names.

    Args:
      config: the architecture, which says what is in flat parameters without metadata.
      parts: the number of model-parallel parts.
      checks: gets the comparisons of tensors that every shard repeats.

    Raises:
      ValueError: shards or tensors are missing or given twice, or do not fit the metadata or the architecture.
    """
    flat = set(filter(is_flat, part.stored))
    if not flat and len(part.paths) > 1:
        raise ValueError(f"{part.paths[1]}: its tensors are whole, so it cannot be a shard beside {part.paths[0]}")
    units = _derive_units(part, flat, config, parts) if part.units is None else part.units
    if absent := sorted((units.keys() - part.stored.keys()) | (flat - units.keys())):
        raise ValueError(f"{part.paths[0]}: {absent[0]} is in its model or in its shard_metadata, but not in both")
    tensors: dict[str, Source] = {}
    for name, unit in units.items():
        for inner, source in _unflatten(part, name, unit):
            if inner in tensors or (inner in part.stored and inner not in units):
                raise ValueError(f"{source.file}: tensor {inner} is there twice")
            tensors[inner] = source
    for name, copies in part.stored.items():  # tensors that are not flattened; with several shards, repeated buffers
        if name not in units:
            sources = [_unsharded(stored) for stored in copies]
            checks.append(partial(same, name, sources))
            tensors[name] = sources[0]
    return tensors


def _unflatten(part: Part, name: str, unit: _Unit) -> Iterator[tuple[str, Source]]:
    """The tensors in a flat parameter, which is the concatenation of its shards without their padding."""
    shards, total = part.stored[name], sum(math.prod(shape) for _, shape in unit)
    sizes = [math.prod(stored.shape) for stored in shards]
    if part.units is not None:
        used = [size - padding for size, padding in zip(sizes, part.padding[name], strict=True)]
        fits = min(used) >= 0
    else:  # fairscale cuts into pieces of equal size and pads the last ones
        each = -(-total // len(shards))
        used = [max(0, min(each, total - i * each)) for i in range(len(shards))]
        fits = set(sizes) == {each}
    if not fits or sum(used) != total:
        raise ValueError(
            f"{part.paths[0]}: {name} has {sum(sizes):,} elements in {counted(len(sizes), 'file')}, which is not what "
            f"the {total:,} elements of its tensors take, according to its "
            + ("shard_metadata: is a shard missing?" if part.units is not None else "config: is it another model's?")
        )
    if any(len(stored.shape) != 1 or stored.dtype != shards[0].dtype for stored in shards):
        raise ValueError(f"{part.paths[0]}: {name} is not one-dimensional, or not of one dtype in all shards")
    runs, end = [], 0
    for stored, n in zip(shards, used, strict=True):
        runs.append((end, end + n, stored))
        end += n
    start = 0
    for inner, shape in unit:
        stop = start + math.prod(shape)
        yield inner, _tensor_in_runs([run for run in runs if run[0] < stop and run[1] > start], start, shape, shards[0])
        start = stop


def _tensor_in_runs(runs: Sequence[tuple[int, int, Stored]], start: int, shape: Shape, like: Stored) -> Source:
    """The tensor that starts at element `start` of a flat parameter.

    Args:
      runs: (first element, end, place) of the pieces of the flat parameter that the tensor overlaps.
      start: the tensor's first element.
      shape: the tensor's shape, of one or two dimensions.
      like: a piece with the tensor's dtype, and its path if there are no runs.
    """
    width = shape[-1]

    def copy(index: Index, out: np.ndarray) -> None:
        rows, columns = index if len(index) == 2 else (slice(0, 1), index[0])
        out = out.reshape(rows.stop - rows.start, columns.stop - columns.start)
        if not out.size:
            return
        corner = start + rows.start * width
        low, high = corner + columns.start, start + (rows.stop - 1) * width + columns.stop
        for run_start, run_stop, stored in runs:
            a, b = max(low, run_start), min(high, run_stop)
            if a < b:
                _copy_columns(out, stored.read((slice(a - run_start, b - run_start),)), a - corner, width, columns)

    return Source(runs[0][2].path if runs else like.path, shape, like.dtype, copy)


def _copy_columns(out: np.ndarray, run: np.ndarray, position: int, width: int, columns: slice) -> None:
    """Copy from `run`, consecutive elements of a matrix, to `out`, which holds some columns of it.

    Args:
      out: the slice of columns `columns`, [rows, columns].
      run: the elements.
      position: the index in the flattened matrix of the first element, counted from the first row of `out`.
      width: the number of columns of the matrix.
      columns: the slice that `out` holds.
    """
    row, column = divmod(position, width)
    while run.size:
        if column or run.size < width:  # the run begins or ends within this row
            n = min(width - column, run.size)
            low, high = max(column, columns.start), min(column + n, columns.stop)
            if low < high:
                out[row, low - columns.start : high - columns.start] = run[low - column : high - column]
            row, column = row + 1, 0
        else:
            count = run.size // width
            n = count * width
            out[row : row + count] = run[:n].reshape(count, width)[:, columns]
            row += count
        run = run[n:]


def _derive_units(part: Part, flat: set[str], config: OPTConfig, parts: int) -> dict[str, _Unit]:
    """The tensors in each flat parameter of files without metadata, such as those released in May 2022."""
    units: dict[str, list[tuple[str, Shape]]] = {name: [] for name in sorted(flat)}
    for name, shape in _tensors_in_order(config, parts, part.paths[0]) if flat else ():
        inside = [key for key in units if key.endswith("flat_param_0") and name.startswith(key[: -len("flat_param_0")])]
        if not inside:
            raise ValueError(f"{part.paths[0]}: tensor {name} is missing: its model has no flat parameter for it")
        units[max(inside, key=len)].append((name, shape))
    return {name: tuple(unit) for name, unit in units.items()}


def _tensors_in_order(config: OPTConfig, parts: int, where: Path) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a part's tensors, in the order of metaseq's modules.

    Source: the metadata of 175B, quoted in metaseq PR 197.

    Raises:
      ValueError: the order is not known for this architecture, or `parts` does not divide its sizes.
    """
    width, ffn, vocab = config.hidden_size, config.ffn_dim, config.vocab_size
    if not config.do_layer_norm_before or config.embed_dim != width or not config.tie_word_embeddings:
        raise ValueError(
            f"{where} has flat parameters without shard_metadata, whose order is not known for this config"
        )
    for name, size in (("hidden_size", width), ("ffn_dim", ffn), ("vocab_size", vocab)):
        if size % parts:
            raise ValueError(f"{where}: {name}={size} is not divisible by the {parts} model parts")

    def linear(name: str, out: int, into: int) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (out, into)
        if config.enable_bias:
            yield f"{name}.bias", (out,)

    def norm(name: str) -> Iterator[tuple[str, Shape]]:
        if config.layer_norm_elementwise_affine:
            yield from ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))

    yield EMBEDDING, (vocab // parts, width)
    yield "decoder.embed_positions.weight", (config.max_position_embeddings + 2, width)
    for i in range(config.num_hidden_layers):
        layer = f"decoder.layers.{i}"
        yield from linear(f"{layer}.self_attn.qkv_proj", 3 * width // parts, width)
        yield from linear(f"{layer}.self_attn.out_proj", width, width // parts)
        yield from norm(f"{layer}.self_attn_layer_norm")
        yield from linear(f"{layer}.fc1", ffn // parts, width)
        yield from linear(f"{layer}.fc2", width, ffn // parts)
        yield from norm(f"{layer}.final_layer_norm")
    if not config._remove_final_layer_norm:
        yield from norm("decoder.layer_norm")


def same(name: str, sources: Sequence[Source]) -> None:
    """Check that all copies of a tensor are equal, bit for bit. Reads them.

    Raises:
      ValueError: one differs; names its file, the tensor and the first index.
    """
    for other in sources[1:]:
        if (index := first_difference(sources[0].lazy(), other.lazy())) is not None:
            where = f" at {list(index)}" if index else " in shape or dtype"
            raise ValueError(f"{other.file}: tensor {name} differs from its copy in {sources[0].file}{where}")


def counted(n: int, what: str) -> str:
    """The number and the noun, in the plural if need be: "1 file", "2 files"."""
    return f"{n} {what}{'s' * (n != 1)}"
