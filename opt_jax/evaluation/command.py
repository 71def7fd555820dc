"""`opt-jax eval`: the perplexity of texts, or the results of tasks of the lm-evaluation-harness."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import opt_jax
from opt_jax.system.temporary import check_new_file, write_file

PROGRAM = "opt-jax"
_TEXT_ONLY = ("text_key", "rows", "protocol", "window", "stride")
_TASKS_ONLY = ("include_path", "num_fewshot", "limit", "log_samples")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Measure a model: perplexity of texts (--data), or tasks of the lm-evaluation-harness (--tasks)."""

    model: Annotated[str, tyro.conf.Positional]
    """"tiny" (the model inside this package), a directory, or a Hugging Face hub id such as facebook/opt-125m."""
    all_checkpoints: bool = False
    """The model is a run of train.py, or a directory of models of one architecture: measure each checkpoint in it."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """With --all-checkpoints: the picture of the curve. Default: evaluation.png in the directory."""
    data: tuple[str, ...] = ()
    """Texts, as in train.py --data. All are joined into one text; see --rows."""
    text_key: str = "text"
    """With --data: the key or column of the text, in all files but text files."""
    rows: Literal["documents", "blank-lines", "spaces", "c4", "c4-new"] = "documents"
    """With --data: how rows become one text. documents: as in training, each with </s> in front. The others are the
    protocols of papers (docs/compression.md). blank-lines, spaces: all rows joined by them. c4: 256 random windows of
    rows that are long enough. c4-new: the first 256 windows of the first 1100 rows, joined by spaces."""
    protocol: Literal["both", "non-overlapping", "sliding"] | None = None
    """With --data. non-overlapping: each window starts where the one before ends, as for the published numbers.
    sliding: windows overlap, so that every token has others before it. Default: both."""
    window: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --data: tokens per window. Default: 2048, or the model's context if that is less."""
    stride: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --data: tokens from the start of a sliding window to the start of the next. Default: half a window."""
    tasks: tuple[str, ...] = ()
    """Tasks of the lm-evaluation-harness, by name; needs the package lm-eval."""
    include_path: tuple[str, ...] = ()
    """With --tasks: directories with more tasks (yaml files)."""
    num_fewshot: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --tasks: examples in front of each question. Default: that of the task."""
    limit: Annotated[float | None, tyro.conf.arg(metavar="NUMBER")] = None
    """With --tasks: only so many documents of each task, the first ones; below 1: this share of them."""
    log_samples: bool = False
    """With --tasks and --output: also write every document with its answers."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Windows or requests at a time. Default: 8, or the next multiple of the mesh's data x fsdp."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of computation and parameters. Default: float32 on a CPU, else as stored (on a TPU bfloat16 for float16)."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: cudnn on GPUs and splash on TPUs, if they support the model; else xla."""
    mesh: str | None = None
    """Shard the model over devices, as in data=2,fsdp=4 or fsdp=-1,tensor=8 (-1: all other devices). Default: one
    device; with several processes, all devices on fsdp."""
    verify: bool = True
    """Compare the weights of an Orbax directory with their checksums."""
    json: bool = False
    """Print JSON instead of tables."""
    output: Path | None = None
    """Also write the JSON to this file."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """One evaluation on several hosts, as in train.py. auto: on a TPU pod, under SLURM, Open MPI or in a Kubernetes
    job, or if the next three options are given."""
    coordinator_address: str | None = None
    """host:port of process 0."""
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    process_id: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    hang_minutes: int = 60
    """With several processes: end the job if loading, or a batch, takes longer."""


def evaluate(options: Annotated[EvalOptions, tyro.conf.arg(name="")]) -> None:
    """Measure a model: perplexity of texts (--data), or tasks of the lm-evaluation-harness (--tasks)."""
    check(options)
    from opt_jax.parallel import processes

    job = options.distributed, options.coordinator_address, options.num_processes, options.process_id
    with processes.last_words(PROGRAM) if processes.is_job(*job) else contextlib.nullcontext():
        processes.start(*job, hang_minutes=options.hang_minutes)
        (_evaluate_series if options.all_checkpoints else _evaluate)(options)


def check(options: EvalOptions) -> None:
    """Raise ValueError for options that contradict each other, before anything is loaded."""
    for name, value in dataclasses.asdict(options).items():
        if "" in (value if isinstance(value, tuple) else (value,)):  # as of a shell's variable that is not set
            raise ValueError(f"--{name.replace('_', '-')} '': the value is empty; leave the option out, or give one")
    if bool(options.data) == bool(options.tasks):
        raise ValueError("give one of --data (a text, for perplexity) and --tasks (of the lm-evaluation-harness)")
    for name in _TASKS_ONLY if options.data else _TEXT_ONLY:
        if getattr(options, name) != getattr(EvalOptions, name):  # its default
            flag, other = name.replace("_", "-"), "tasks" if options.data else "data"
            raise ValueError(f"--{flag} without effect: it goes with --{other}")
    if options.stride is not None and options.protocol == "non-overlapping":
        raise ValueError("--stride without effect: non-overlapping windows have none")
    if options.rows == "c4" and options.protocol != "non-overlapping":
        raise ValueError("--rows c4 needs --protocol non-overlapping: its random windows do not follow each other")
    if options.rows in ("c4", "c4-new") and options.window is None:
        raise ValueError(f"--rows {options.rows} needs --window, the tokens of its windows: 2048 in the papers")
    if options.plot is not None and not options.all_checkpoints:
        raise ValueError("--plot without effect: it goes with --all-checkpoints")
    if options.log_samples and options.output is None:
        raise ValueError("--log-samples without effect: say where to write them with --output")
    _check_numbers(options)
    if options.output is not None and (options.output.is_dir() or not options.output.absolute().parent.is_dir()):
        raise ValueError(f"--output {options.output}: must be a file in an existing directory")
    if options.output is not None:
        check_new_file(options.output, _is_report, "a report of opt-jax eval")


def _check_numbers(options: EvalOptions) -> None:
    if options.hang_minutes < 1:
        raise ValueError(f"--hang-minutes {options.hang_minutes}: must be at least 1")
    if options.limit is not None and not 0 < options.limit < 2**31:
        raise ValueError(f"--limit {options.limit}: must be above 0, and below 2**31")
    if options.limit is not None and options.limit > 1 and not options.limit.is_integer():
        raise ValueError(f"--limit {options.limit}: must be a number of documents, or a share of them below 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {options.num_fewshot}: must not be negative")


def _is_report(content: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        parsed: Any = json.loads(content)
        reports = parsed if isinstance(parsed, list) and parsed else [parsed]  # a list of --all-checkpoints
        return all(
            isinstance(report, dict) and ({"model", "versions", "results"} <= report.keys() or "error" in report)
            for report in reports
        )
    return False


def _evaluate(options: EvalOptions) -> None:
    from opt_jax.parallel import agreement, processes
    from opt_jax.text.tokenizer import OPTTokenizer

    agreement.check_same_options(dataclasses.asdict(options))
    tokenizer = OPTTokenizer.from_pretrained(options.model)  # before the weights: it fails sooner
    work = prepare(options, tokenizer)
    processes.reached("loading the model")
    model = load(options, options.model)
    report = measure(options, options.model, model, tokenizer, work)
    if options.data:
        shown = text_table(report)
    else:
        from opt_jax.evaluation.harness import tables

        shown = tables(report)
    show(options, report, shown)
    save(options, report)


def _evaluate_series(options: EvalOptions) -> None:
    """Measure each checkpoint of a directory, with one compilation. One that fails is a line on stderr.

    Raises:
      ValueError: the architectures differ, before anything is measured; or, at the end, a checkpoint has failed.
    """
    from opt_jax.evaluation import series
    from opt_jax.evaluation._perplexity import NotFiniteError
    from opt_jax.parallel import agreement, processes

    agreement.check_same_options(dataclasses.asdict(options))
    checkpoints = series.find(options.model)
    config = series.common_config(checkpoints)
    picture = series.picture(options.model, options.plot)
    placement = None if config is None else place(options, config)
    failures, tokenizers, program = series.Failures(PROGRAM), series.Tokenizers(), series.OneProgram()
    tokenizer = work = None
    reports: list[dict[str, Any]] = []

    def report_of(checkpoint: series.Checkpoint) -> dict[str, Any] | None:
        nonlocal tokenizer, work
        name, before = str(checkpoint.path), tokenizer
        processes.reached(f"loading {name}")
        tokenizer = failures.attempt(checkpoint, lambda: tokenizers.of(checkpoint)) or before
        if checkpoint in failures.lines:
            return None
        if tokenizer is not before:
            work = prepare(options, tokenizer)
        model = failures.attempt(checkpoint, lambda: program.of(load(options, name, placement)))
        if model is None:
            return None
        return failures.attempt(checkpoint, lambda: measure(options, name, model, tokenizer, work), NotFiniteError)

    for checkpoint in checkpoints:
        report = report_of(checkpoint) or {"model": str(checkpoint.path), "error": failures.lines[checkpoint]}
        reports.append({"checkpoint": checkpoint.path.name, "step": checkpoint.step} | report)
        save(options, reports)
    if len(failures.lines) < len(checkpoints):
        measured = next(report for report in reports if "error" not in report)
        about = f"{len(checkpoints)} checkpoints of {measured['parameters']:,} parameters"
        heading = _heading(measured | {"model": options.model}, about)
        show(options, reports, f"{heading}\n{_aligned(series.rows(reports))}\n{picture}\n")
        agreement.on_first_process(lambda: series.draw(reports, options.model, picture))
    if failures.lines:
        raise ValueError(f"{len(failures.lines)} of {len(checkpoints)} checkpoints failed, see above")


def prepare(options: EvalOptions, tokenizer: Any) -> Any:
    """What is measured: (ids, number of documents) of --data, or what `harness.find_tasks` returns for --tasks."""
    from opt_jax.data.tokens import hash_of_ids
    from opt_jax.parallel import agreement

    if options.data:
        ids, documents = read_ids(options.data, tokenizer, options.text_key, options.rows, options.window)
        agreement.check_same({"--data": f"{len(ids)} tokens, {hash_of_ids(ids)}"})
        return ids, documents
    from opt_jax.evaluation.harness import find_tasks

    return find_tasks(options.tasks, options.include_path)


def measure(options: EvalOptions, name: str, model: Any, tokenizer: Any, work: Any) -> dict[str, Any]:
    """The report on a model.

    Args:
      options: those of the command.
      name: of the model.
      model: the model.
      tokenizer: its tokenizer.
      work: what `prepare` returned for this tokenizer.
    """
    from opt_jax.parallel import processes

    processes.reached("the first batch")
    report = report_head(options, name, model)
    if options.data:
        ids, documents = work
        return report | {"documents": documents, "tokens": len(ids), "results": perplexities(options, model, ids)}
    from opt_jax.evaluation.harness import run

    settings: dict[str, Any] = dict(
        num_fewshot=options.num_fewshot, limit=options.limit, log_samples=options.log_samples
    )
    return report | run(model, tokenizer, work, options.batch_size, **settings)


def _as_json(report: Any) -> str:
    return json.dumps(_finite(report), indent=2, default=_plain, allow_nan=False, ensure_ascii=False) + "\n"


def save(options: EvalOptions, report: Any) -> None:
    """Write the report, or the list of reports, to --output."""
    import jax

    if options.output is not None and jax.process_index() == 0:
        write_file(options.output, _as_json(report).encode())


def show(options: EvalOptions, report: Any, shown: str) -> None:
    """Print the report as JSON or as `shown`."""
    import jax

    if jax.process_index() == 0:
        print(_as_json(report) if options.json else shown, end="", flush=True)


def place(options: EvalOptions, config: Any) -> tuple[Any, Any]:
    """(mesh, implementation of attention) for models with this config."""
    import jax

    from opt_jax.model.attention_choice import choose_attention
    from opt_jax.parallel.mesh import make_mesh

    is_job = jax.process_count() > 1
    mesh = make_mesh(options.mesh) if options.mesh or is_job else None
    platform = jax.default_backend()
    dtype = options.dtype or ("float32" if platform == "cpu" else "bfloat16")
    return mesh, choose_attention(options.attention, platform, config.head_dim, dtype, 0.0)


def load(options: EvalOptions, name: str, placement: tuple[Any, Any] | None = None) -> Any:
    """The model of this name, sharded over the mesh. `placement` is what `place` returns for its config."""
    from opt_jax.checkpoints import hub, pretrained
    from opt_jax.model.heads import OPTForCausalLM

    if placement is None:
        placement = place(options, pretrained.read_config(hub.resolve(name, weights=False))[0])
    mesh, attention = placement
    return OPTForCausalLM.from_pretrained(
        name,
        dtype=options.dtype,
        mesh=mesh,
        attn_implementation=attention,
        verify=options.verify,
    )


def read_ids(
    paths: Sequence[str], tokenizer: Any, text_key: str = "text", rows: str = "documents", window: int | None = None
) -> tuple[Any, int]:
    """(int32 [N], the number of documents): `paths` as in --data, `rows` as in --rows, `window` of its form "c4"."""
    from opt_jax.data.protocols import evaluation_ids, read_rows
    from opt_jax.data.tokens import tokenize

    documents = read_rows(paths, text_key)
    if rows != "documents":
        return evaluation_ids(documents, rows, tokenizer, window or 0), len(documents)
    documents = [document for document in documents if document.strip()]
    return tokenize(documents, tokenizer)[:-1], len(documents)  # without the last `</s>`


def perplexities(options: EvalOptions, model: Any, ids: Any) -> list[dict[str, Any]]:
    """The fields of a `Perplexity` for each protocol of the options."""
    from opt_jax.evaluation._perplexity import PROTOCOLS, perplexity

    asked = PROTOCOLS if options.protocol in (None, "both") else (options.protocol,)
    results = []
    for protocol in asked:
        with _bar(protocol) as progress:
            results.append(
                perplexity(
                    model,
                    ids,
                    protocol,
                    window=options.window,
                    batch_size=options.batch_size,
                    progress=progress,
                    stride=options.stride if protocol == "sliding" else None,
                )
            )
    return [dataclasses.asdict(result) for result in results]


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Any]:
    """A progress bar, if stderr of process 0 is a terminal. In a job it also reports progress to the watchdog."""
    import jax
    from rich.console import Console
    from rich.progress import Progress

    from opt_jax.parallel import processes

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=jax.process_index() > 0 or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            processes.reached(f"{title} window {done}")
            bar.update(task, completed=done, total=total)

        yield show


def report_head(options: EvalOptions, name: str, model: Any) -> dict[str, Any]:
    """The part of the report that describes model, data and versions."""
    import jax

    from opt_jax.parallel.mesh import mesh_of

    mesh = mesh_of(model)
    return {
        "model": name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "dtype": str(model.dtype),
        "device": jax.devices()[0].device_kind,
        "mesh": None if mesh is None else dict(mesh.shape),
        "data": list(options.data) or None,
        "versions": {"opt-jax": opt_jax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def text_table(report: dict[str, Any]) -> str:
    """The results of --data as a table for the terminal."""
    heads = ("protocol", "window", "stride", "windows", "tokens", "left out", "loss", "perplexity", "seconds")
    rows: list[tuple[str, ...]] = [heads]
    for r in report["results"]:
        plus = [
            "" if r[f"{name}_stderr"] is None else f" ± {r[f'{name}_stderr']:.{d}f}"
            for name, d in (("loss", 4), ("perplexity", 3))
        ]
        counts = (f"{r[name]:,}" for name in ("window", "stride", "windows", "tokens", "left_out"))
        values = (f"{r['loss']:.4f}{plus[0]}", f"{r['perplexity']:.3f}{plus[1]}", f"{r['seconds']:.1f}")
        rows.append((r["protocol"], *counts, *values))
    about = f"{report['parameters']:,} parameters"
    return f"{_heading(report, about)}\n{_aligned(rows)}"


def _heading(report: dict[str, Any], about: str) -> str:
    mesh = "" if report["mesh"] is None else ", mesh " + " x ".join(f"{k}={v}" for k, v in report["mesh"].items())
    lines = [f"{report['model']}: {about}, {report['dtype']}, {report['device']}{mesh}\n"]
    if report["data"]:
        plural = "s" * (report["documents"] > 1)
        data = f"{report['documents']} document{plural}, {report['tokens']:,} tokens"
        lines.append(f"{', '.join(report['data'])}: {data}\n")
    return "".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python scalar; any other object, such as a function of a task, as a string."""
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    """The value with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
