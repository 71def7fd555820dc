"""`python -m convert SRC DST`: a PyTorch OPT checkpoint to Orbax."""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro


def run(
    src: Annotated[str, tyro.conf.Positional],
    dst: Annotated[Path, tyro.conf.Positional],
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> None:
    """Convert a Hugging Face OPT checkpoint (safetensors or .bin, sharded or not) to an Orbax directory.

    Needs no PyTorch, and memory for little more than the largest tensor. DST appears complete or not at all.

    Args:
      src: A hub id (facebook/opt-125m), a local directory, or "tiny", the model inside this package.
      dst: The directory to write.
      overwrite: Replace DST if it is a model directory already.
      dtype: Cast the parameters; default: keep their dtype, bit for bit.
      revision: Branch, tag or commit of a hub id.
      cache_dir: Where downloads are kept; default: Hugging Face's cache.
      offline: Take a hub id from the cache, never from the network.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    from convert.to_orbax import Totals, convert
    from opt_jax import checkpoint, hub

    start = time.monotonic()
    checkpoint.check_destination(dst, overwrite)  # before a long download
    source = hub.resolve(src, revision=revision, cache_dir=cache_dir, local_files_only=offline)
    console = Console(stderr=True)
    name_column = TextColumn("{task.fields[name]}", table_column=Column(max_width=24, no_wrap=True))  # 80 in all
    columns = (BarColumn(12), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), name_column)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, name="")

        def progress(name: str, written: int, totals: Totals) -> None:
            bar.update(task, completed=written, total=totals.bytes, name=name.removeprefix("model.decoder."))

        totals = convert(source, dst, dtype=dtype, overwrite=overwrite, progress=progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{dst}: {totals.parameters:,} parameters, {totals.bytes:,} bytes, {time.monotonic() - start:.1f} seconds, "
        f"peak RSS {peak / 1e6:,.0f} MB"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 fine, 1 bad checkpoint or destination, 2 bad usage."""
    try:
        tyro.cli(run, args=argv, prog="python -m convert", config=(tyro.conf.FlagCreatePairsOff,))
    except (OSError, ValueError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # files to files: leave the accelerators alone
    sys.exit(main())
