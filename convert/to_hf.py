"""Writes an opened checkpoint as a Hugging Face directory: safetensors files, their index, config and tokenizer."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from opt_jax.checkpoints import directories, hub, saving
from opt_jax.checkpoints.formats import gptq, hf_writer, quantized
from opt_jax.checkpoints.formats.hf_writer import FileWriter, Progress
from opt_jax.parallel import agreement
from opt_jax.system.temporary import refuse_links

from . import staging
from .checkpoint import Checkpoint
from .to_orbax import cast

_SAMPLES = 64  # `_Writer._content_hash` hashes at most so many vectors


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
    """Write `source` as a directory that `transformers` loads. It appears complete or not at all.

    All processes of a `jax.distributed` job call this together; each writes some of the files.

    Args:
      dtype: cast the parameters to it. Default: each keeps its dtype, bit for bit.
      max_shard_size: the largest size of the tensors in one file: a number of bytes, or "500MB", "5GB", "5GiB". A
        larger tensor has a file of its own.
      shard_of: (i, n): write every n-th file, from the i-th on, and publish if all others are there; see `unfinished`.
      progress: called after each slab with the path of its array and its size in bytes. Several threads call it, one
        at a time.

    Raises:
      FileExistsError: see `directories.new_directory`; or another worker writes the same file now.
      OSError: the disk is full. With `shard_of`, files that are complete stay for the next run.
      ValueError: a tensor is missing, left over, misshapen, damaged or out of range for `dtype`; the source has changed
        meanwhile; a bad `max_shard_size` or `shard_of`; or the destination was begun from another source or with other
        options.
    """
    job = jax.process_count() > 1
    if shard_of is not None:
        if job:
            raise ValueError("--shard-of is for separate commands: leave it out, the job divides the files itself")
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
        staging.discard(staging.directory_of(destination))  # killed workers may have left it


class _Writer:
    """The files to write, which are the same in all workers, and how to write them."""

    def __init__(self, source: Checkpoint, dtype: str | None, limit: int, progress: Progress) -> None:
        self.source, self.dtype, self.limit = source, dtype, limit
        self.cls: str = source.raw_config["architectures"][0]
        arrays = {path: cast(source, path, dtype) for path in source.arrays}
        self.quantized = gptq.writer(arrays, source.quantization)
        self.files = hf_writer.plan_files(self.cls, arrays, limit, self.quantized)
        self.files_writer = FileWriter(progress)

    def plan(self) -> dict[str, Any]:
        """The plan (`staging.join`) by which workers notice that they do not write the same files."""
        return {
            "source": os.path.realpath(self.source.where),
            "content": self._content_hash(),
            "dtype": self.dtype,
            "max_shard_size": self.limit,
            "files": {file.name: file.nbytes for file in self.files},
        }

    def _content_hash(self) -> str:
        """A hash of the config, the files' sizes and times, some vectors, and one row of each of a few matrices.

        To hash all data would take too long.
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

    def write_descriptions(self, directory: Path) -> None:
        """Write all other files: config, tokenizer, generation config, index. Then check that the source is unchanged.

        Raises:
          ValueError: the source has changed since it was opened.
        """
        raw = self.source.raw_config if self.dtype is None else saving.set_dtype(self.source.raw_config, self.dtype)
        if self.quantized is not None:
            raw = quantized.with_settings(raw, self.quantized.settings)
        hf_writer.write_json(directory / "config.json", raw)
        saving.copy_companions(self.source.companions, directory)
        hf_writer.write_descriptions(directory, self.cls, self.source.config, self.files)
        self.source.files.check()


# Several processes ---------------------------------------------------------------------------------------------


def unfinished(destination: Path) -> list[str]:
    """The names of the files that are missing before `destination` is published; [] if it is, or none was begun."""
    return staging.unfinished(staging.directory_of(destination))


def _convert_part(writer: _Writer, destination: Path, shard_of: tuple[int, int], overwrite: bool) -> None:
    """Write the i-th of n parts of the files, and publish the destination if all are complete."""
    if shard_of[0] > len(writer.files):  # this part is empty
        return
    directories.check_destination(destination, overwrite, hub.is_model)
    directory, plan = staging.directory_of(destination), writer.plan()
    staging.join(directory, plan)
    _write_part(writer, directory, shard_of)
    place = staging.place_of(directory)
    with place.locked():
        current_plan = staging.read_plan(directory)
        if current_plan != plan:  # another worker found all files complete and published them
            if current_plan is None:
                place.remove()
            if not hub.is_model(destination):
                raise OSError(f"{directory} was removed while parts of {destination} were written to it: start again")
        elif not staging.unfinished(directory):
            with directories.new_directory(destination, overwrite, hub.is_model) as new:
                _collect(writer, directory, new)
            place.remove()


def _convert_in_job(writer: _Writer, destination: Path, overwrite: bool) -> None:
    """Write the files in all processes of a `jax.distributed` job. An error in one process is raised in all."""
    directory = staging.directory_of(destination)

    def begin() -> None:
        directories.check_destination(destination, overwrite, hub.is_model)
        if staging.read_plan(directory) not in (None, writer.plan()):
            staging.discard(directory)  # a killed job left it; if it is in use, it stays and `join` raises

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
    """Write the i-th of n parts of the files to the shared directory, but for files that are complete already."""
    part = writer.files[shard_of[0] - 1 :: shard_of[1]]
    missing = [file for file in part if not staging.complete(directory / file.name, file.nbytes)]
    directories.check_space(directory, sum(file.nbytes for file in missing))
    for file in missing:
        with staging.new_file(directory, file.name, file.nbytes) as fd:
            writer.files_writer.write(fd, file)
            writer.source.files.check()


def _collect(writer: _Writer, directory: Path, new: Path) -> None:
    """Write all other files into `new`, and move the weights there after all that may fail."""
    writer.write_descriptions(new)
    for file in writer.files:
        os.rename(directory / file.name, new / file.name)
    hf_writer.check_written(new, writer.files)
