"""The command `opt-jax tokenize`. No jax."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from opt_jax.data.arrays import is_array
from opt_jax.data.documents import find_sources
from opt_jax.data.files import TEXT_SUFFIXES, size_of
from opt_jax.data.records import TEXT_KEY
from opt_jax.data.shards import write_arrays
from opt_jax.data.tokens import write_tokens
from opt_jax.text.tokenizer import OPTTokenizer

_BYTES = 16 << 20  # of text, which are tokenised in the seconds that a process takes to start


def tokenize_sources(
    names: Sequence[str],
    output: Path | None,
    tokenizer: str,
    workers: int | None,
    skip_bad: bool,
    text_key: str = TEXT_KEY,
) -> str:
    """`write_tokens` into a name that ends in .npy, else `write_arrays`, with a progress bar. Returns a line.

    Raises:
      ValueError, FileNotFoundError: as `find_sources`, `write_tokens` and `write_arrays`; or a bad option.
    """
    if not names or output is None:
        raise ValueError("name what to read and where to write: opt-jax tokenize texts/ --output texts.npy")
    if output.suffix not in ("", ".npy") and not output.is_dir():
        raise ValueError(f"--output {output}: must end in .npy, or be a directory (a name without an ending)")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    sources = find_sources(names, TEXT_SUFFIXES, text_key)
    if arrays := [source for source in sources if is_array(source)]:
        raise ValueError(f"{arrays[0]}: is tokenised already")
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    # The bar counts characters against bytes, so for many languages it ends before its end.
    sizes = [size_of(source) for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if workers is None:
        cores = _cores()
        workers = cores if total is None else max(1, min(cores, total // _BYTES))
    write = write_tokens if output.suffix == ".npy" else write_arrays
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        about = write(
            sources,
            output,
            OPTTokenizer.from_pretrained(tokenizer),
            tokenizer,
            workers=workers,
            skip_bad=skip_bad,
            text_key=text_key,
            progress=lambda characters: bar.advance(task, characters),
        )
    arrays = f" in {len(about['arrays']):,} arrays" if "arrays" in about else ""
    left_out = f", {about['left_out']:,} bad records left out" if about["left_out"] else ""
    return (
        f"{output}: {about['tokens']:,} tokens of {about['documents']:,} documents as {about['dtype']}{arrays}"
        f"{left_out}, in {time.monotonic() - begin:.1f} s"
    )


def _cores() -> int:
    """The number of cores that this process may use; under SLURM or taskset not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
