"""Writes an opened checkpoint as an Orbax model directory, piece by piece, without PyTorch or an accelerator."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax import numpy as jnp

from opt_jax.checkpoints import chunks, directories, hub, orbax, pretrained, saving
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import hf, quantized
from opt_jax.parallel import agreement
from opt_jax.system.disk import write_content

from .checkpoint import Checkpoint


def convert(
    source: Checkpoint,
    destination: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Write `source` as an Orbax model directory, complete or not at all.

    All processes of a `jax.distributed` job call this together; each reads and writes its part.

    Args:
      destination: the directory, also at `gs://...`.
      dtype: cast the parameters to it, but for quantized matrices. Default: each keeps its dtype, bit for bit.
      progress: called after each piece with the path of its array and its size in bytes.

    Raises:
      FileExistsError: see `directories.new_directory`.
      OSError: the disk is full.
      ValueError: a tensor (named in the message) is missing, left over, misshapen, damaged or out of range for `dtype`;
        the source has changed meanwhile; or see `hub.check_array_path`.
    """
    hub.check_array_path(destination)
    agreement.on_first_process(source.check)
    arrays = quantized.expand({path: cast(source, path, dtype) for path in source.arrays})
    config = dict(source.raw_config) if dtype is None else saving.set_dtype(source.raw_config, dtype)
    if (settings := quantized.settings_for(source.arrays, source.quantization)) is not None:
        config = quantized.with_settings(config, settings)
    with directories.new_directory(destination, overwrite) as new:
        directories.check_space(new, sum(array.nbytes for array in arrays.values()))
        orbax.write_arrays(new / "params", arrays, progress)

        def finish() -> None:
            check_written(new, arrays)
            saving.copy_companions(source.companions, new)
            source.files.check()
            write_content(new / "config.json", json.dumps(config, indent=2).encode() + b"\n")

        agreement.on_first_process(finish)


def cast(source: Checkpoint, path: str, dtype: str | None) -> LazyArray:
    """The array at `path`, cast to `dtype` when it is read. A quantized matrix stays as it is.

    Raises:
      ValueError: models are not kept in the dtype; or, when the array is read, a finite value overflows in it.
    """
    array = source.arrays[path]
    if isinstance(array, quantized.QuantizedArray):
        return array
    target = jnp.dtype(dtype or array.dtype)
    if target.name not in pretrained.PARAM_DTYPES:
        name = hf.stored_as(path, ())[0]
        raise ValueError(
            f"{source.where}: tensor {name} is {target}, which models are not kept in; use --dtype float32"
        )
    if target == array.dtype:
        return array

    def read(index: chunks.Index) -> np.ndarray:
        before = array.read(index)
        with np.errstate(over="ignore"):  # an overflow is an error below
            after = before.astype(target)
        if (np.isfinite(before) > np.isfinite(after)).any():
            name = hf.stored_as(path, ())[0]
            raise ValueError(f"{source.where}: tensor {name} has values that {target} cannot hold; use another --dtype")
        return after

    return LazyArray(array.shape, target, read, array.chunk)


def check_written(directory: Path, arrays: dict[str, LazyArray]) -> None:
    """Compare names, shapes, dtypes and the total size on disk with what was to be written.

    metaseq's own script once reported success after it had written 376 KB of 2.5 GB (metaseq issue 695).

    Raises:
      OSError: they differ.
    """
    written = orbax.open_arrays(directory / "params")
    for path in arrays.keys() | written.keys():
        expected, actual = ((x[path].shape, x[path].dtype) if path in x else None for x in (arrays, written))
        if expected != actual:
            raise OSError(f"{directory}: {path} was to be {expected}, but is {actual} on disk: nothing was published")
    if hub.is_remote(directory):  # an object store has no partial objects
        return
    nbytes = sum(array.nbytes for array in arrays.values())
    on_disk = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    if on_disk < nbytes:
        raise OSError(f"{directory}: {on_disk} bytes are on disk, less than {nbytes}: nothing was published")
