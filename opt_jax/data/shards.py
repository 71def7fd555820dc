"""Tokenises files into a directory of arrays that are one sequence (`arrays.py`), each array by one process. No jax.

While it is written the directory is `.NAME.new/new`. An array in it is finished when it has its .json, and is kept when
the command is ended. The last step renames the directory.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.data.arrays import INDEX, Arrays, array_name, hash_of_samples, open_array, read_index
from opt_jax.data.documents import Source, pieces
from opt_jax.data.files import state_of
from opt_jax.data.records import FURTHER, SHOWN, TEXT_KEY, BadRecords, HFSource
from opt_jax.data.tokenizers import tokenizer_to_bytes
from opt_jax.data.tokens import block_of, dtype_of, encode, hash_of_vocabulary, write_array
from opt_jax.data.workers import count, tokenizer_here, worker_processes
from opt_jax.system.disk import disk_errors
from opt_jax.system.messages import one_line
from opt_jax.system.reading import SMALL_FILE
from opt_jax.system.temporary import TemporaryPlace, new_file, refuse_links, unfinished_files, write_file
from opt_jax.text.tokenizer import OPTTokenizer

_ENTRY = 1000  # bytes that an array adds to the index, at most, besides its sources
_INPUT = 16 << 20  # bytes of small files that become one array
_TOTALS = ("tokens", "documents", "left_out")


@dataclass(frozen=True)
class Shard:
    """What becomes one array.

    Attributes:
      number: of the array, from 0.
      sources: what it holds, in order.
      states: `state_of` each of them.
    """

    number: int
    sources: tuple[Source, ...]
    states: tuple[dict[str, Any], ...]

    @property
    def size(self) -> int:
        return sum(state.get("size", _INPUT) for state in self.states)


def shards_of(sources: Sequence[Source]) -> list[Shard]:
    """The sources in order, a large one alone, small ones together. Depends on nothing but names and sizes."""
    groups: list[list[tuple[Source, dict[str, Any]]]] = []
    room = -1  # bytes that the last group may still get
    for source in sources:
        state = _state(source)
        size = state.get("size", _INPUT)
        if size > room:
            groups.append([])
            room = _INPUT
        groups[-1].append((source, state))
        room -= size
    return [Shard(i, tuple(s for s, _ in group), tuple(s for _, s in group)) for i, group in enumerate(groups)]


def _state(source: Source) -> dict[str, Any]:
    return source.state() if isinstance(source, HFSource) else state_of(source)


@dataclass(frozen=True)
class _Job:
    """What all arrays have in common.

    Attributes:
      directory: where they are written.
      about: the fields of the index that the ids depend on.
      skip_bad: leave out bad records.
    """

    directory: Path
    about: dict[str, Any]
    skip_bad: bool

    def array(self, number: int) -> Path:
        return self.directory / array_name(number)

    def entry(self, number: int) -> Path:
        return self.array(number).with_suffix(".json")


def write_arrays(
    sources: Sequence[Source],
    output: Path,
    tokenizer: OPTTokenizer,
    name: str,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    text_key: str = TEXT_KEY,
    progress: Callable[[int], None] = lambda characters: None,
) -> dict[str, Any]:
    """Tokenise documents into the directory `output`. Returns the content of its index.

    The ids are those of `write_tokens`, in several arrays. Arrays and index are the same for any number of workers, and
    if the call was ended and made again. A directory that is complete stays as it is.

    Args:
      sources, tokenizer, name, skip_bad, text_key: as `write_tokens`.
      output: the directory. It appears when it is complete.
      workers: processes, of which each writes whole arrays; 1: this one.
      progress: called with numbers of characters.

    Raises:
      ValueError: a bad record without `skip_bad`, no documents, a failed worker, a file that changes while it is read;
        other inputs or options than those of the arrays that are there, finished or not; or too many files.
      FileExistsError: `output` exists and is no such directory; or see `TemporaryPlace.locked`.
    """
    refuse_links(output)
    output = Path(os.path.realpath(output))
    shards = shards_of(sources)
    place = TemporaryPlace(output.with_name(f".{output.name}.new"), "new")
    content = hashlib.sha256(tokenizer_to_bytes(tokenizer)).hexdigest()[:16]
    about = {
        "dtype": str(dtype_of(tokenizer)),
        "tokenizer": {"name": name, "fingerprint": hash_of_vocabulary(tokenizer), "content": content},
        "text_key": text_key,
    }
    job = _Job(place.path / "new", about, skip_bad)
    listed = len(_json({"arrays": [{"sources": shard.states} for shard in shards]}))
    if listed + _ENTRY * (len(shards) + 1) > SMALL_FILE:
        raise ValueError(
            f"{len(sources):,} files are too many for an index of {SMALL_FILE >> 20} MiB: write their texts into fewer "
            "files (.jsonl)"
        )
    if (output / INDEX).exists():
        index = read_index(output / INDEX)
        _check_same(index, job, shards, output, "choose another name, or remove it", complete=True)
        Arrays(output / INDEX).verify()
        return index
    if output.exists() and (names := os.listdir(output) if output.is_dir() else [output.name]):
        raise FileExistsError(f"{output} is there already, and holds {min(names)}, but no {INDEX}: choose another name")
    with disk_errors(place.path), place.locked(wait=False):
        entries = _finished(job, shards, place.path)  # if it raises, the arrays of the other command stay
        try:
            job.directory.mkdir(exist_ok=True)
            progress(sum(shard.size for shard in shards if shard.number in entries))
            missing = [shard for shard in shards if shard.number not in entries]
            _write_missing(missing, entries, job, tokenizer, workers, progress)
            index = _index(about, [entries[shard.number] for shard in shards])
            if not index["documents"]:
                raise ValueError("no documents in the data: every file is empty")
            write_file(job.directory / INDEX, _json(index))
            arrays = {job.array(shard.number) for shard in shards}
            for path in set(job.directory.glob("opt-jax-*")) - arrays:  # entries, and what a killed process has left
                path.unlink()
            os.rename(job.directory, output)
            place.remove()
        except BaseException:
            _leave(job, len(shards), place)
            raise
    return index


def _index(about: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(entry[key] for entry in entries) for key in _TOTALS} | about | {"arrays": entries}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _leave(job: _Job, number: int, place: TemporaryPlace) -> None:
    """After an error or a signal: remove what is not finished, and say what is."""
    with suppress(OSError):
        for part in unfinished_files(job.directory):
            part.unlink(missing_ok=True)
        is_complete = (job.directory / INDEX).exists()
        finished = number if is_complete else sum(job.entry(i).exists() for i in range(number))
        if finished:
            what = f"{finished:,} of {number:,} arrays are finished"
            print(f"{what}: the same command goes on from there", file=sys.stderr, flush=True)
        else:
            place.remove()


# What is there --------------------------------------------------------------------------------------------------------


def _finished(job: _Job, shards: Sequence[Shard], place: Path) -> dict[int, dict[str, Any]]:
    """Number -> entry of the index, of the arrays that an earlier call has finished.

    Raises:
      ValueError: they are of other inputs or options.
    """
    index = job.directory / INDEX
    files = [index] if index.exists() else sorted(job.directory.glob("opt-jax-*.json"))  # killed before the renaming
    numbers = {array_name(shard.number): shard.number for shard in shards}
    entries = {}
    for file in files:
        content = read_index(file)
        _check_same(content, job, shards, place, "start the same command as then, or remove it")
        entries |= {numbers[entry["file"]]: entry for entry in content["arrays"]}
    return {number: entry for number, entry in entries.items() if _is_intact(job.array(number), entry)}


def _is_intact(array: Path, entry: dict[str, Any]) -> bool:
    try:
        return hash_of_samples(open_array(array)) == entry["hash"]
    except (OSError, ValueError):
        return False


def _check_same(
    saved: dict[str, Any], job: _Job, shards: Sequence[Shard], where: Path, remedy: str, complete: bool = False
) -> None:
    """Raise ValueError if arrays are there that this call would not write. `complete`: and no others."""
    if difference := _difference(saved, job, shards, complete):
        raise ValueError(f"{where} was made of other inputs or with other options: {difference}; {remedy}")


def _difference(saved: dict[str, Any], job: _Job, shards: Sequence[Shard], complete: bool) -> str:
    then, now = saved["tokenizer"], job.about["tokenizer"]
    if then["content"] != now["content"]:
        names = [one_line(tokenizer["name"], 200) for tokenizer in (then, now)]
        return f"--tokenizer {names[1]} has changed" if names[0] == names[1] else f"--tokenizer was {names[0]}"
    if saved["text_key"] != job.about["text_key"]:
        return f"--text-key was {one_line(saved['text_key'], 200)}"
    if saved["left_out"] and not job.skip_bad:
        return f"--skip-bad-records left out {saved['left_out']:,} records"
    states = {state["name"]: state for shard in shards for state in shard.states}
    by_name = {array_name(shard.number): shard for shard in shards}
    for entry in saved["arrays"]:
        for source in entry["sources"]:
            name = one_line(source["name"], 200)
            if source["name"] not in states:
                return f"{name} was an input, and is none now"
            if states[source["name"]] != source:
                return f"{name} has changed"
        shard = by_name.get(entry["file"])
        if shard is None or list(shard.states) != entry["sources"]:
            return f"there are other inputs beside {one_line(entry['sources'][0]['name'], 200)}, or in another order"
    if complete and len(shards) > len(saved["arrays"]):
        return f"{shards[len(saved['arrays'])].sources[0]} is a new input"
    return ""


# Making arrays --------------------------------------------------------------------------------------------------------


def _write_missing(
    missing: Sequence[Shard],
    entries: dict[int, dict[str, Any]],
    job: _Job,
    tokenizer: OPTTokenizer,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write these arrays, and add their entries of the index to `entries`."""
    reported = 0

    def add(number: int, entry: dict[str, Any], lines: list[str]) -> None:
        nonlocal reported
        entries[number] = entry
        for line in lines:
            reported += 1
            if reported <= SHOWN + 1:
                print(line if reported <= SHOWN else FURTHER, file=sys.stderr, flush=True)

    if workers == 1:
        for shard in missing:
            add(shard.number, *_write_array(shard, job, tokenizer, progress))
        return
    with worker_processes(workers, tokenizer) as pool:
        # The largest first, so that no process is left alone with one at the end.
        largest_first = sorted(missing, key=lambda shard: -shard.size)
        futures = {pool.submit(_work, shard, job): shard.number for shard in largest_first}
        pending, seen = set(futures), 0
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                add(futures[future], *future.result())
            seen, before = pool.characters(), seen
            progress(seen - before)


def _work(shard: Shard, job: _Job) -> tuple[dict[str, Any], list[str]]:
    return _write_array(shard, job, tokenizer_here(), count)


def _write_array(
    shard: Shard, job: _Job, tokenizer: OPTTokenizer, progress: Callable[[int], None]
) -> tuple[dict[str, Any], list[str]]:
    """Write an array, and its entry of the index beside it. Returns the entry, and lines that report bad records."""
    lines: list[str] = []
    bad, path = BadRecords(job.skip_bad, lines.append), job.array(shard.number)
    first = [] if shard.number else [tokenizer.bos_token_id]
    with new_file(path) as file:
        texts = pieces(shard.sources, bad, block_of(tokenizer), job.about["text_key"])
        parts = encode(texts, tokenizer, workers=1)
        tokens, documents = write_array(file, np.dtype(job.about["dtype"]), first, parts, progress)
        for source, state in zip(shard.sources, shard.states, strict=True):
            if _state(source) != state:
                raise ValueError(f"{source} has changed while it was read: run again when nothing writes to it")
    entry = {
        "file": path.name,
        "tokens": tokens,
        "documents": documents,
        "left_out": bad.count,
        "hash": hash_of_samples(open_array(path)),
        "sources": list(shard.states),
    }
    write_file(job.entry(shard.number), _json(_index(job.about, [entry])))
    return entry, lines
