"""Opens metaseq checkpoints: joins model-parallel parts and FSDP shards, lazily, under our parameter paths.

A file holds {"model": tensors, "cfg" or "args": settings, "shard_metadata": ..., and the state of training}. Megatron's
tensor parallelism splits a model into parts. A part is one file, or several if FSDP has cut it into shards: FSDP
concatenates the tensors of a layer into a vector (`flat_param_0`), pads it, and cuts it into pieces of equal size.

Sources: metaseq's scripts/reshard_mp.py, distributed/stitch_fsdp_ckpt.py, and the released files.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.checkpoints import hub
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.chunks import Index
from opt_jax.checkpoints.formats import names
from opt_jax.checkpoints.saving import set_dtype
from opt_jax.checkpoints.source_files import SourceFiles
from opt_jax.config import OPTConfig

from .checkpoint import Checkpoint, check_shapes
from .metaseq_config import choose_config
from .metaseq_parts import (
    EMBEDDING,
    Part,
    Source,
    check_copies,
    check_settings,
    counted,
    is_flat,
    open_part,
    part_tensors,
    same,
)

_NAME = re.compile(r"(.+?)(?:-model_part-(\d+))?(?:-shard(\d+))?(?:\.pt)?", re.DOTALL)
_HEAD = "decoder.output_projection.weight"
_OTHER_NAMES = {
    "decoder.layer_norm.": "decoder.final_layer_norm.",
    "decoder.project_in_dim.": "decoder.project_in.",
    "decoder.project_out_dim.": "decoder.project_out.",
    _HEAD: "lm_head.weight",
}


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the arguments of a command line stand for.

    Args:
      patterns: files, directories (which stand for their `*.pt`) and globs.

    Raises:
      FileNotFoundError: an argument stands for no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = hub.disk_path(pattern)
        if path.is_dir():
            matches = sorted(path.glob("*.pt"))
        else:
            matches = [path] if path.exists() else [Path(name) for name in sorted(glob(str(path)))]
        if not matches:
            raise FileNotFoundError(f"{pattern} {'has no .pt files' if path.is_dir() else 'is not there'}")
        files += matches
    return files


def stem(path: Path) -> str:
    """The name of a file without `.pt`, model part and shard: all files of a checkpoint have the same."""
    match = _NAME.fullmatch(path.name)
    return path.name if match is None else match[1]


def open_checkpoint(files: Sequence[Path], *, config: OPTConfig | None) -> Checkpoint:
    """The checkpoint that consists of `files`. Reads their descriptions, no tensors.

    Args:
      files: all files of the checkpoint, in any order.
      config: the architecture. None: it is in the files. If both have it, they must agree; dropout rates are taken from
        `config`.

    Raises:
      FileNotFoundError: a part or shard is missing.
      ValueError: a file is damaged, given twice, or of another checkpoint; the parts do not fit each other or the
        architecture; or there is no architecture. Names the file, and the tensor if there is one.
    """
    grid, as_opened = _arrange(files), SourceFiles(files)
    for folder in dict.fromkeys(path.parent for path in files):
        as_opened.add(folder / name for name in hub.COMPANION_FILES)
    parts = [open_part(paths) for paths in grid]
    for part in parts[1:]:
        check_settings(part.paths[0], part.settings, grid[0][0], parts[0].settings)
    first = grid[0][0]
    draft = choose_config(parts[0].settings, config, first)
    checks: list[Callable[[], object]] = [partial(check_copies, parts)]
    joined = _join([part_tensors(part, draft, len(grid), checks) for part in parts], draft, checks)
    if config is None and EMBEDDING in joined:
        draft = replace(draft, vocab_size=joined[EMBEDDING].shape[0])
    arrays: dict[str, LazyArray] = {}
    for name, tensor in joined.items():
        try:
            path, transposed = names.from_hf(name)
        except KeyError:
            raise ValueError(f"{tensor.file}: tensor {name} is left over: no OPT model has it") from None
        if path in arrays:
            raise ValueError(f"{tensor.file}: tensor {name} is there twice, fused with others and alone")
        arrays[path] = tensor.lazy().T if transposed else tensor.lazy()
    embedding = joined.get(EMBEDDING)
    raw = draft.to_hf() | {"architectures": ["OPTForCausalLM"]}
    opened = Checkpoint(
        where=first if len(files) == 1 else first.parent,
        format=_format(parts),
        config=draft,
        raw_config=set_dtype(raw, embedding.dtype.name) if embedding else raw,
        arrays=arrays,
        companions=tuple(dict.fromkeys(path.parent for path in files)),
        checks=tuple(checks),
        files=as_opened,
    )
    try:
        check_shapes(opened)
    except ValueError as e:
        raise ValueError(f"{e} (from {counted(len(grid), 'model part')}: are they all?)") from None
    return opened


def _format(parts: Sequence[Part]) -> str:
    form = "whole tensors"
    if any(map(is_flat, parts[0].stored)):
        form = f"flat parameters, {'with' if parts[0].units else 'without'} metadata"
    shards = len(parts[0].paths)
    return (
        f"metaseq, {counted(len(parts), 'model part')} in {counted(shards, 'file')}{' each' * (len(parts) > 1)}, {form}"
    )


def _arrange(files: Sequence[Path]) -> list[list[Path]]:
    """The files, indexed by model part and shard, both in numeric order."""
    if not files:
        raise ValueError("no metaseq files given")
    grid: dict[tuple[int, int], Path] = {}
    kind: Any = None
    for path in files:
        match = _NAME.fullmatch(path.name)
        stem, part, shard = match.groups() if match else (path.name, None, None)
        kind = kind or (stem, part is None, shard is None)
        if kind != (stem, part is None, shard is None):
            raise ValueError(
                f"{path} is of another checkpoint than {files[0]}: give the files of one checkpoint, as with a glob"
            )
        cell = int(part or 0), int(shard or 0)
        if cell in grid:
            raise ValueError(f"{path} and {grid[cell]} are the same part of the checkpoint: give one of them")
        grid[cell] = path
    parts, shards = (max(numbers) + 1 for numbers in zip(*grid, strict=True))
    for part, shard in product(range(parts), range(shards)):
        if (part, shard) not in grid:
            name = kind[0] + ("" if kind[1] else f"-model_part-{part}") + ("" if kind[2] else f"-shard{shard}") + ".pt"
            raise FileNotFoundError(
                f"{files[0].parent / name} is missing: {counted(len(files), 'file')} of {parts * shards}"
            )
    return [[grid[part, shard] for shard in range(shards)] for part in range(parts)]


# Joining the parts ------------------------------------------------------------------------------------------


def _join(
    parts: Sequence[Mapping[str, Source]], config: OPTConfig, checks: list[Callable[[], object]]
) -> dict[str, Source]:
    """The model's tensors, joined from all parts, by their names in Hugging Face's base model (`OPTModel`).

    Appends to `checks` the comparisons of tensors that every part repeats.
    """
    joined: dict[str, Source] = {}
    for other in parts[1:]:
        if different := sorted(parts[0].keys() ^ other.keys()):
            has, lacks = (parts[0], other) if different[0] in parts[0] else (other, parts[0])
            file = next(iter(lacks.values())).file
            raise ValueError(f"{file}: tensor {different[0]} is missing, which {has[different[0]].file} has")
    for name in parts[0]:
        sources = [part[name] for part in parts]
        if name == "decoder.version":
            continue
        if name == _HEAD and config.tie_word_embeddings:
            for part in parts:
                if EMBEDDING in part:
                    checks.append(partial(same, name, [part[EMBEDDING], part[name]]))
            continue
        hf_name = name
        for ours, theirs in _OTHER_NAMES.items():
            hf_name = hf_name.replace(ours, theirs) if name.startswith(ours) else hf_name
        if ".self_attn.qkv_proj." in name:
            for i, letter in enumerate("kvq"):
                thirds = [_third_of_rows(source, i, name) for source in sources]
                joined[hf_name.replace("qkv", letter)] = _concatenate(name, thirds, 0)
        elif re.search(r"\.(embed_tokens|output_projection|fc1|[kvq]_proj)\.(weight|bias)$", name):
            joined[hf_name] = _concatenate(name, sources, 0)
        elif re.search(r"\.(fc2|out_proj)\.weight$", name):
            joined[hf_name] = _concatenate(name, sources, 1)
        else:
            checks.append(partial(same, name, sources))
            joined[hf_name] = sources[0]
    return joined


def _third_of_rows(source: Source, i: int, name: str) -> Source:
    """The i-th third of a tensor's rows: metaseq stores the key, value and query projections as one."""
    if not source.shape or source.shape[0] % 3:
        raise ValueError(f"{source.file}: tensor {name} has shape {source.shape}, which three projections cannot share")
    n = source.shape[0] // 3

    def copy(index: Index, out: np.ndarray) -> None:
        source.copy((slice(index[0].start + i * n, index[0].stop + i * n), *index[1:]), out)

    return Source(source.file, (n, *source.shape[1:]), source.dtype, copy)


def _concatenate(name: str, sources: Sequence[Source], axis: int) -> Source:
    """The concatenation of one tensor's parts along `axis`, read lazily."""
    first = sources[0]
    for other in sources:
        kinds = [(s.dtype, len(s.shape), s.shape[:axis] + s.shape[axis + 1 :]) for s in (first, other)]
        if kinds[0] != kinds[1] or len(other.shape) <= axis:
            raise ValueError(
                f"{other.file}: tensor {name} ({other.dtype}, shape {other.shape}) cannot be joined with that in "
                f"{first.file} ({first.dtype}, shape {first.shape})"
            )
    lengths = [source.shape[axis] for source in sources]

    def copy(index: Index, out: np.ndarray) -> None:
        wanted, start = index[axis], 0
        for source, length in zip(sources, lengths, strict=True):
            low, high = max(wanted.start, start), min(wanted.stop, start + length)
            if low < high:
                source_index, out_index = list(index), [slice(None)] * len(index)
                source_index[axis] = slice(low - start, high - start)
                out_index[axis] = slice(low - wanted.start, high - wanted.start)
                source.copy(tuple(source_index), out[tuple(out_index)])
            start += length

    return Source(first.file, (*first.shape[:axis], sum(lengths), *first.shape[axis + 1 :]), first.dtype, copy)
