"""An opened checkpoint to a Hugging Face directory: safetensors files, their index, configuration and tokenizer."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from opt_jax.checkpoints import directories, hub, pretrained
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import hf_writer, names
from opt_jax.checkpoints.formats.hf_writer import FileWriter, Progress, Tensor
from opt_jax.parallel import agreement
from opt_jax.system.temporary import refuse_links

from . import staging
from .checkpoint import Checkpoint
from .to_orbax import cast

_SAMPLES = 64  # tensors of which a plan remembers values


def convert(
    source: Checkpoint,
    destination: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    shard_of: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda name, nbytes: None,
) -> None:
    """Write `source` as a directory that `transformers` loads; `destination` appears complete or not at all.

    All processes of a `jax.distributed` job call this together; each writes some of the files.

    Args:
      dtype: cast to it; default: keep each tensor's own, bit for bit.
      max_shard_size: of the tensors in one file: bytes, or "500MB", "5GB", "5GiB". A larger tensor has its own file.
      shard_of: (i, n): write every n-th file, from the i-th on, and publish if all others are there; see `unfinished`.
      progress: called after each slab with the path of its array and its bytes, by several threads, one at a time.

    Raises:
      FileExistsError: see `directories.new_directory`; or another worker writes the same file now.
      OSError: the disk is full. With `shard_of`, files that are complete stay for the next run.
      ValueError: damaged data, values out of range for `dtype`, a source that changed meanwhile, a bad `max_shard_size`
        or `shard_of`, or `shard_of` for a destination that was begun from another source or with other options.
    """
    job = jax.process_count() > 1
    if shard_of is not None:
        if job:
            raise ValueError("--shard-of is for separate commands: a jax.distributed job shares out the files itself")
        if not 1 <= shard_of[0] <= shard_of[1]:
            raise ValueError(f"--shard-of {shard_of[0]}/{shard_of[1]}: i/n needs 1 <= i <= n")
    limit = hf_writer.parse_size(max_shard_size)
    agreement.on_first_process(source.check)
    writer = _Writer(source, dtype, limit, progress)
    refuse_links(destination)
    destination = Path(os.path.realpath(destination))
    if job:
        _convert_in_job(writer, destination, overwrite)
    elif shard_of is not None:
        _convert_part(writer, destination, shard_of, overwrite)
    else:
        with directories.new_directory(destination, overwrite, hub.is_model) as new:
            directories.check_space(new, sum(file.nbytes for file in writer.files))
            writer.files_writer.write_all(new, writer.files)
            writer.write_descriptions(new)
            hf_writer.check_written(new, writer.files)
        staging.discard(staging.directory_of(destination))  # what killed workers have left


class _Writer:
    """What is to be written, the same for all workers, and how."""

    def __init__(self, source: Checkpoint, dtype: str | None, limit: int, progress: Progress) -> None:
        self.source, self.dtype, self.limit = source, dtype, limit
        self.cls: str = source.raw_config["architectures"][0]
        arrays = {path: cast(source, path, dtype) for path in source.arrays}
        self.files = hf_writer.plan_files(self.cls, arrays, limit)
        self.files_writer = FileWriter(self._load, progress)

    def plan(self) -> dict[str, Any]:
        """By which workers know that they write parts of the same thing."""
        return {
            "source": os.path.realpath(self.source.where),
            "content": self._sample(),
            "dtype": self.dtype,
            "max_shard_size": self.limit,
            "files": {file.name: file.nbytes for file in self.files},
        }

    def _sample(self) -> str:
        """A hash of the description, the files' sizes and times, some vectors, and one row of a few matrices.

        Reading all data would take too long.
        """
        description = [self.cls, dict(self.source.raw_config), self.source.files.hash_of_states()]
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
        arrays = self.source.arrays
        for path in sorted(arrays):
            digest.update(f"{path} {arrays[path].shape} {arrays[path].dtype}\n".encode())
        vectors = sorted(path for path in arrays if len(arrays[path].shape) == 1)
        matrices = sorted(arrays.keys() - set(vectors))
        for path in vectors[:: len(vectors) // _SAMPLES + 1] + matrices[:: len(matrices) // 4 + 1]:
            first = [slice(None)] if path in vectors else [slice(0, 1), slice(None)]
            digest.update(arrays[path].load(first).tobytes())
        return digest.hexdigest()

    def _load(self, tensor: Tensor) -> LazyArray:
        held = dataclasses.replace(self.source, arrays={tensor.path: self._hold(tensor.path)})
        array = cast(held, tensor.path, self.dtype)
        return array.T if names.to_hf(tensor.path)[1] else array

    def _hold(self, path: str) -> LazyArray:
        """The array; if it is stored in chunks, a copy of all of it.

        Slabs of HF's rows are columns of ours: to read them one by one would read each chunk of a grid several times.
        """
        array = self.source.arrays[path]
        if not array.in_chunks:
            return array
        values = array.read(tuple(slice(0, n) for n in array.shape))
        return LazyArray(array.shape, array.dtype, values.__getitem__)

    def write_descriptions(self, directory: Path) -> None:
        raw = self.source.raw_config if self.dtype is None else pretrained.set_dtype(self.source.raw_config, self.dtype)
        hf_writer.write_json(directory / "config.json", raw)
        pretrained.copy_companions(self.source.companions, directory)
        hf_writer.write_descriptions(directory, self.cls, self.source.config, self.files)
        self.source.files.check()  # all has been read


# Several processes ---------------------------------------------------------------------------------------------


def unfinished(destination: Path) -> list[str]:
    """The files that other workers have still to write before `destination` appears; [] if it was published."""
    return staging.unfinished(staging.directory_of(destination))


def _convert_part(writer: _Writer, destination: Path, shard_of: tuple[int, int], overwrite: bool) -> None:
    """One of several commands that know nothing of each other."""
    if shard_of[0] > len(writer.files):  # nothing to do, before or after the others
        return
    directories.check_destination(destination, overwrite, hub.is_model)
    directory, plan = staging.directory_of(destination), writer.plan()
    staging.join(directory, plan)
    _write_part(writer, directory, shard_of)
    place = staging.place_of(directory)
    with place.locked():
        current_plan = staging.read_plan(directory)
        if current_plan != plan:  # all were there when another looked, and it published
            if current_plan is None:
                place.remove()
            if not hub.is_model(destination):
                raise OSError(f"{directory} was removed while parts of {destination} were written to it: start again")
        elif not staging.unfinished(directory):
            with directories.new_directory(destination, overwrite, hub.is_model) as new:
                _collect(writer, directory, new)
            place.remove()


def _convert_in_job(writer: _Writer, destination: Path, overwrite: bool) -> None:
    """All processes of a `jax.distributed` job in step: what one finds wrong ends the others as well."""
    directory = staging.directory_of(destination)

    def begin() -> None:
        directories.check_destination(destination, overwrite, hub.is_model)
        if staging.read_plan(directory) not in (None, writer.plan()):
            staging.discard(directory)  # of a job that was killed; if one is alive, `join` refuses

    agreement.on_first_process(begin)
    error = None
    try:
        staging.join(directory, writer.plan())
        _write_part(writer, directory, (jax.process_index() + 1, jax.process_count()))
    except Exception as e:
        error = e
    try:
        agreement.agree(error)
        with directories.new_directory(destination, overwrite, hub.is_model) as new:
            agreement.on_first_process(lambda: _collect(writer, directory, new))
    finally:
        if jax.process_index() == 0:
            staging.discard(directory)


def _write_part(writer: _Writer, directory: Path, shard_of: tuple[int, int]) -> None:
    mine = writer.files[shard_of[0] - 1 :: shard_of[1]]
    mine = [file for file in mine if not staging.complete(directory / file.name, file.nbytes)]
    directories.check_space(directory, sum(file.nbytes for file in mine))
    for file in mine:
        with staging.new_file(directory, file.name, file.nbytes) as fd:
            writer.files_writer.write(fd, file)
            writer.source.files.check()


def _collect(writer: _Writer, directory: Path, new: Path) -> None:
    """Move the files into the directory to be published, after all else that might fail."""
    writer.write_descriptions(new)
    for file in writer.files:
        os.rename(directory / file.name, new / file.name)
    hf_writer.check_written(new, writer.files)
