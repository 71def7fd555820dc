"""`python -m convert`: turns OPT checkpoints into Orbax or Hugging Face directories, shows them, compares them."""

import signal

# Ctrl-C during the imports ends the process without a traceback. A background job that ignores SIGINT still ignores it.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from opt_jax.checkpoints import hub
from opt_jax.system.disk import error_line, keep_standard_descriptors, warning_lines
from opt_jax.system.interrupts import exit_code

from .job import UsageError, leave_accelerators_alone, repeat_lost_signals, started

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Src = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC...")]
Paths = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC... DST")]
Dst = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
Dtype = Literal["float32", "bfloat16", "float16"]
PROG = "python -m convert"


@dataclass(frozen=True)
class SourceOptions:
    """How to find and read SRC."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    cache_dir: Path | None = None
    """Where downloads are kept. Default: Hugging Face's cache (HF_HOME)."""
    offline: bool = False
    """Take a hub id from the cache, never from the network."""
    adapter: str | None = None
    """A PEFT adapter (LoRA) of SRC, to be merged in: a directory or a hub id."""
    no_verify: bool = False
    """Do not compare the data of an Orbax directory with their checksums."""
    dequantize: bool = False
    """Turn the matrices of a quantized model into floats."""


@dataclass(frozen=True)
class MetaseqOptions:
    """The architecture of a metaseq checkpoint, which its files may not state."""

    model: Literal["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"] | None = None
    """The architecture of a published size."""
    config: Path | None = None
    """A config.json with any other architecture."""

    def check(self) -> None:
        """Check that at most one option names the architecture.

        Raises:
          UsageError: both are given.
        """
        if self.model is not None and self.config is not None:
            raise UsageError("--model and --config both name the architecture: give one of them")


@dataclass(frozen=True)
class WriteOptions:
    """How to write DST."""

    overwrite: bool = False
    """Replace DST if it is a model directory already."""
    dtype: Dtype | None = None
    """Cast the parameters, but for quantized matrices. Default: keep their dtype, bit for bit."""
    quiet: bool = False
    """Print no progress, only errors and one line at the end."""


@dataclass(frozen=True)
class JobOptions:
    """How several processes find each other to convert one checkpoint together."""

    distributed: Literal["auto", "on", "off"] = "auto"
    """One conversion on several hosts, as in train.py. auto: on a TPU pod, under SLURM or Open MPI, in a Kubernetes
    job, or if the next three options are given."""
    coordinator_address: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Number of processes of the job."""
    process_id: int | None = None
    """Number of this process, from 0."""
    hang_minutes: int = 60
    """With several processes: end if opening or downloading SRC, or converting a piece of it, takes longer."""

    def for_one_shard(self) -> "JobOptions":
        """The options of a process that works alone because of --shard-of, even if its environment is a cluster's.

        Raises:
          UsageError: the options ask for a job of several processes.
        """
        explicit = (self.coordinator_address, self.num_processes, self.process_id)
        if self.distributed == "on" or self.distributed == "auto" and any(value is not None for value in explicit):
            raise UsageError(
                "--shard-of is for separate commands: leave it out, the processes of a job divide the files themselves"
            )
        return dataclasses.replace(self, distributed="off")


Source = Annotated[SourceOptions, tyro.conf.arg(name="")]
Metaseq = Annotated[MetaseqOptions, tyro.conf.arg(name="")]
Write = Annotated[WriteOptions, tyro.conf.arg(name="")]
Job = Annotated[JobOptions, tyro.conf.arg(name="")]


def to_orbax(
    src: Src,
    dst: Dst,
    /,
    source: Source = SourceOptions(),
    write: Write = WriteOptions(),
    job: Job = JobOptions(),
) -> None:
    """Convert an OPT checkpoint to an Orbax model directory.

    Needs no PyTorch, and little memory whatever the size of the model. DST appears complete or not at all.

    Other commands (each has its own --help; write ./inspect for a directory of that name):

    metaseq SRC... DST         convert a checkpoint of Meta's metaseq: model-parallel parts, FSDP shards; or several

    to-hf SRC DST              convert to Hugging Face's form, safetensors

    verify DST --against SRC   compare two checkpoints bit by bit

    inspect SRC                show what a checkpoint holds

    Args:
      src: A hub id (facebook/opt-125m), a directory (Hugging Face, Orbax, a run of train.py or one of its checkpoints),
        or "tiny", the model inside this package.
      dst: The directory to write, on a disk or in Google Cloud Storage (gs://BUCKET/NAME).
    """
    _convert([src], dst, source, MetaseqOptions(), write, job)


def metaseq(
    paths: Paths,
    /,
    series: bool = False,
    metaseq: Metaseq = MetaseqOptions(),
    write: Write = WriteOptions(),
    job: Job = JobOptions(),
) -> None:
    """Convert a checkpoint of Meta's metaseq to an Orbax model directory.

    Args:
      paths: SRC... DST. SRC: all files of the checkpoint, in any order: model-parallel parts, FSDP shards or both; a
        quoted glob; or the directory they are in. DST: the directory to write.
      series: SRC are several checkpoints. Write each to DST/NAME, with the NAME of its files. Those that are there
        already are compared with their files and passed over. If one fails, the others are still converted.
    """
    *files, dst = _sources_and_destination(paths)
    metaseq.check()
    (_convert_series if series else _convert_metaseq)(files, dst, metaseq, write, job)


def _convert_metaseq(
    files: Sequence[str], dst: str, metaseq: MetaseqOptions, write: WriteOptions, job: JobOptions | None
) -> None:
    _convert(files, dst, SourceOptions(), metaseq, write, job, from_metaseq=True)


def to_hf(
    paths: Paths,
    /,
    max_shard_size: str = "5GB",
    shard_of: str | None = None,
    source: Source = SourceOptions(),
    metaseq: Metaseq = MetaseqOptions(),
    write: Write = WriteOptions(),
    job: Job = JobOptions(),
) -> None:
    """Convert an OPT checkpoint to Hugging Face's form: safetensors, config.json, tokenizer files.

    Args:
      paths: SRC DST as for `python -m convert`, or SRC... DST: files of a metaseq checkpoint.
      max_shard_size: The largest size of one file, as in 500MB, 5GB or 5GiB.
      shard_of: i/n: write only the i-th of n parts of the files. Run the n commands in any order, on any hosts that
        share the file system; the last one completes DST.
    """
    from opt_jax.checkpoints.formats.hf_writer import parse_size

    from . import to_hf
    from .progress import Work

    *names, target = _sources_and_destination(paths)
    if hub.is_remote(target):
        raise UsageError(f"{target}: Hugging Face's form is written to disks only: write a local directory and copy it")
    dst, part = hub.as_path(target), _shard_of(shard_of)
    metaseq.check()
    if part is not None:
        job = job.for_one_shard()
    try:
        parse_size(max_shard_size)
    except ValueError as e:
        raise UsageError(str(e).replace("max_shard_size", "--max-shard-size")) from None
    options = _options(names, target, source, metaseq, write) | {"max_shard_size": max_shard_size}
    with started(**dataclasses.asdict(job), options=options):
        opened = _open(names, dst, source, metaseq, write, hub.is_model if part is None else None)
        with Work(opened, dst, write.dtype, write.quiet, part) as report:
            to_hf.convert(
                opened,
                dst,
                dtype=write.dtype,
                max_shard_size=max_shard_size,
                shard_of=part,
                overwrite=write.overwrite,
                progress=report,
            )


def verify(
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    /,
    against: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SRC...")],
    quiet: bool = False,
    source: Source = SourceOptions(),
    metaseq: Metaseq = MetaseqOptions(),
) -> None:
    """Compare two checkpoints in any two forms: architecture, tensors, dtypes, and every bit.

    If they differ, prints the first difference; the exit code is 1.

    Args:
      dst: The checkpoint to check, usually a conversion.
      against: The checkpoint that it was made from. Several names: the files of a metaseq checkpoint.
      quiet: Print no progress.
    """
    from .inspect import compare
    from .progress import Report
    from .source import is_here

    metaseq.check()
    leave_accelerators_alone()
    # --cache-dir and --offline belong to whichever is a hub id. The other options belong to SRC.
    dst_options = dataclasses.replace(source, revision=None, adapter=None, dequantize=False)
    if is_here(dst):
        dst_options = SourceOptions(no_verify=source.no_verify)
    elif is_here(against[0]) and (source.adapter is None or is_here(source.adapter)):
        source = dataclasses.replace(source, cache_dir=None, offline=False)
    ours = _open_source([dst], dst_options, MetaseqOptions())
    theirs = _open_source(against, source, metaseq)
    _check_no_verify(source, ours, theirs)
    ours.check()
    theirs.check()
    with Report(theirs.nbytes, quiet) as report:
        difference = compare(ours, theirs, report)
    for opened in (ours, theirs):
        opened.files.check()
    if difference is not None:
        raise ValueError(difference)
    print(f"{dst}: the same {len(theirs.arrays)} tensors, {theirs.nbytes:,} bytes, as {theirs.where}")


def inspect(src: Files, /, source: Source = SourceOptions(), metaseq: Metaseq = MetaseqOptions()) -> None:
    """Show format, config, tensors, dtypes and sizes of a checkpoint without loading it.

    Args:
      src: As for the other commands. Several names: the files of a metaseq checkpoint.
    """
    from .checkpoint import check_shapes
    from .inspect import summary

    metaseq.check()
    leave_accelerators_alone()
    opened = _open_source(src, source, metaseq)
    _check_no_verify(source, opened)
    for line in summary(opened):
        print(line)
    check_shapes(opened)


def _convert_series(
    files: Sequence[str], dst: str, metaseq: MetaseqOptions, write: WriteOptions, job: JobOptions
) -> None:
    from . import series

    checkpoints = series.find(files)
    options = _options(files, dst, SourceOptions(), metaseq, write) | {"series": True}
    with started(**dataclasses.asdict(job), options=options):
        series.convert_each(
            checkpoints,
            dst,
            write.overwrite,
            convert=lambda files, place: _convert_metaseq(files, place, metaseq, write, None),
            verify=lambda files, place: series.verify(
                files, place, write.dtype, write.quiet, **dataclasses.asdict(metaseq)
            ),
        )


COMMANDS = {"metaseq": metaseq, "to-hf": to_hf, "verify": verify, "inspect": inspect}


def _sources_and_destination(paths: Sequence[str]) -> Sequence[str]:
    if len(paths) < 2:
        raise UsageError("give the files of the checkpoint and, last, the directory to write: SRC... DST")
    return paths


def _shard_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise UsageError(f"--shard-of {text}: give i/n with 1 <= i <= n, as in 1/4")
    return int(i), int(n)


def _quiet_downloads(quiet: bool) -> None:
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _open(
    names: Sequence[str],
    dst: Path,
    source: SourceOptions,
    metaseq: MetaseqOptions,
    write: WriteOptions,
    replaceable: Callable[[Path], bool] | None,
    from_metaseq: bool = False,
) -> "Checkpoint":
    """The opened SRC. Before that, checks that DST can be written (`replaceable` None: the caller checks later).

    DST is checked again when it is written and when it is published.
    """
    from opt_jax.checkpoints import directories
    from opt_jax.parallel import agreement

    error = opened = None
    try:
        if replaceable is not None:
            directories.check_destination(dst, write.overwrite, replaceable)
        _quiet_downloads(write.quiet)
        opened = _open_source(names, source, metaseq, from_metaseq, write.dtype)
        _check_no_verify(source, opened)
        inside = os.path.realpath(dst)
        for path in (opened.where, *opened.companions):
            if inside in (real := os.path.realpath(path), *map(str, Path(real).parents)):
                raise ValueError(f"{dst} is, or holds, the checkpoint to convert ({path}): choose another DST")
    except Exception as e:
        error = e
    agreement.agree(error)  # raises in all processes of a job; otherwise the others would wait for this one
    assert opened is not None
    return opened


def _open_source(
    names: Sequence[str],
    source: SourceOptions,
    metaseq: MetaseqOptions,
    from_metaseq: bool = False,
    dtype: str | None = None,
) -> "Checkpoint":
    from .source import open_source

    options = {**dataclasses.asdict(source), **dataclasses.asdict(metaseq)}
    options["verify"] = not options.pop("no_verify")
    return open_source(names, **options, from_metaseq=from_metaseq, dtype=dtype)


def _check_no_verify(source: SourceOptions, *opened: "Checkpoint") -> None:
    if source.no_verify and not any(hub.is_orbax(checkpoint.where) for checkpoint in opened):
        raise ValueError(f"--no-verify is for Orbax directories: {opened[-1].where} has no checksums")


def _options(
    names: Sequence[str], target: str, source: SourceOptions, metaseq: MetaseqOptions, write: WriteOptions
) -> dict[str, Any]:
    """What all processes of a job must have been given, `quiet` left out."""
    values = dataclasses.asdict(source) | dataclasses.asdict(metaseq) | dataclasses.asdict(write)
    return values | {"SRC": names, "DST": target, "quiet": None}


def _convert(
    names: Sequence[str],
    target: str,
    source: SourceOptions,
    metaseq: MetaseqOptions,
    write: WriteOptions,
    job: JobOptions | None,  # None: it has started
    from_metaseq: bool = False,
) -> None:
    from .progress import Work
    from .to_orbax import convert

    if hub.is_remote(target):
        hub.check_remote(target)
    dst = hub.as_path(target)
    hub.check_array_path(dst)
    options = _options(names, target, source, metaseq, write)
    with nullcontext() if job is None else started(**dataclasses.asdict(job), options=options):
        opened = _open(names, dst, source, metaseq, write, hub.is_orbax, from_metaseq)
        with Work(opened, dst, write.dtype, write.quiet) as report:
            convert(opened, dst, dtype=write.dtype, overwrite=write.overwrite, progress=report)


def main(argv: Sequence[str] | None = None, program: str = PROG) -> int:
    """Run a command and return its exit code.

    0 is success, 1 a bad checkpoint or destination, 2 bad usage, 130 or 143 an interruption by SIGINT or SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command, prog = to_orbax, program
    if args and args[0] in COMMANDS:
        command, prog = COMMANDS[args[0]], f"{program} {args.pop(0)}"
    try:
        with warning_lines():
            tyro.cli(command, args=args, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... inspect X | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as e:
        print(f"error: {error_line(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        # Orbax objects that were interrupted print warnings when they are garbage-collected. One line is enough.
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return exit_code(e)
    return 0


def run(argv: Sequence[str] | None = None, program: str = PROG) -> int:
    """Run `main` as a program and return its exit code."""
    keep_standard_descriptors()
    sys.unraisablehook = repeat_lost_signals
    return main(argv, program)


if __name__ == "__main__":
    sys.exit(run())
