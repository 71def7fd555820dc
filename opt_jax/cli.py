"""The command line `opt-jax ...`. Each command imports what it needs when it runs, so that `--help` is quick."""

import importlib.util
import inspect
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

import opt_jax
from opt_jax.compression.command import compress_model
from opt_jax.evaluation.command import evaluate
from opt_jax.generation.command import PlanOptions, plan_generation
from opt_jax.generation.command import check as check_plan
from opt_jax.system.disk import error_line, keep_standard_descriptors, warning_lines
from opt_jax.system.interrupts import ends_at_once, exit_code, raises

DEFAULT_NEW_TOKENS = 200


def generate(  # noqa: PLR0913  (the options of a command)
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = (),
    /,
    *,
    model: str = "tiny",
    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    temperature: float = 0.7,
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = (),
    seed: int = 0,
    verify: bool = True,
    planned: Annotated[PlanOptions, tyro.conf.arg(name="")] = PlanOptions(),  # noqa: B008
) -> None:
    """Continue prompts. The text is printed as it is generated.

    Args:
      prompts: The texts to continue, one after the other. Without a prompt, standard input is the prompt.
      model: "tiny" (the model inside this package), a directory, or a Hugging Face hub id such as facebook/opt-125m.
      max_new_tokens: The most tokens to add to a prompt; None: 200, or as many as fit into the context.
      temperature: Randomness; 0: always the most likely token.
      top_k: Sample from this many of the most likely tokens; 0: from all; None: 50.
      top_p: Sample from the fewest most likely tokens that have this probability together.
      min_p: Sample from tokens with at least this share of the most likely token's probability.
      repetition_penalty: Above 1: tokens that have occurred become less likely.
      no_repeat_ngram_size: No sequence of this many tokens occurs twice; 0: no such limit.
      stop: Texts at which to stop.
      seed: Seed of the samples.
      verify: Compare the weights of an Orbax directory with their checksums.
      planned: Options of --plan.
    """
    values = locals()
    flags = {"prompts": "the prompts", "verify": "--no-verify"}
    sampling = {
        flags.get(name, f"--{name.replace('_', '-')}"): values[name] != parameter.default
        for name, parameter in inspect.signature(generate).parameters.items()
        if name not in ("model", "max_new_tokens", "planned")
    }
    check_plan(planned, sampling)
    if planned.plan:
        plan_generation(model, max_new_tokens, planned)
        return
    for option in ("--top-k", "--top-p", "--min-p", "--seed"):
        if sampling[option] and not temperature:
            raise ValueError(f"{option} without effect: --temperature 0 always takes the most likely token")
    prompts = prompts or (_read_stdin(),)

    from opt_jax.text.tokenizer import OPTTokenizer

    tokenizer = OPTTokenizer.from_pretrained(model)  # before the weights: it fails sooner

    from opt_jax.model.heads import OPTForCausalLM
    from opt_jax.text.pipelines import stream_text

    language_model = OPTForCausalLM.from_pretrained(model, verify=verify)
    options: dict[str, Any] = dict(
        do_sample=bool(temperature),
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        stop_strings=stop or None,
    )
    if temperature:
        options |= dict(temperature=temperature, top_k=50 if top_k is None else top_k)
    options = {name: value for name, value in options.items() if value is not None}  # the checkpoint may set these
    for i, prompt in enumerate(prompts):
        inputs = tokenizer(prompt, return_tensors="np")
        room = language_model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        new = max(1, min(DEFAULT_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
        pieces = stream_text(language_model, tokenizer, inputs, max_new_tokens=new, seed=seed + i, **options)
        _print("\n" * (i > 0) + prompt)
        for piece in pieces:
            _print(piece)
        _print("\n")


def plot(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = (),
    /,
    *,
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None,
) -> None:
    """Draw loss, learning rate, gradient norm and tokens/s of training runs.

    Args:
      runs: Directories of train.py's runs, drawn into one picture.
      output: The picture, a PNG. None: curves.png in the (first) run's directory.
    """
    if not runs:
        raise ValueError("no run: name its directory, as in opt-jax plot runs/small")

    from opt_jax.checkpoints import hub
    from opt_jax.training.plot import plot_runs

    if output is None and hub.is_remote(runs[0]):
        raise ValueError(f"{runs[0]} is not on this machine: say where the picture is to be, with --output FILE.png")
    paths = [hub.as_path(run) for run in runs]
    output = paths[0] / "curves.png" if output is None else output
    plot_runs(paths, output)
    _print(f"{output}\n")


def tokenize(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")] = (),
    /,
    *,
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE.npy|DIRECTORY")] = None,
    tokenizer: str = "tiny",
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    text_key: str = "text",
    skip_bad_records: bool = False,
) -> None:
    """Turn texts into arrays of token ids, which train.py --data memory-maps.

    Args:
      sources: Text, .jsonl, .json, .csv, .parquet or .arrow files, compressed or not; directories or globs of them;
        URLs (gs://, s3://, hf://); hf:NAME[,CONFIG][:SPLIT].
      output: FILE.npy: one array; FILE.npy.json beside it describes it. One process reads. Any name without an ending:
        a directory of arrays, for many large files. Each process reads and writes by itself, and the same command
        goes on where it was ended. train.py reads both in the same way.
      tokenizer: "tiny" (the one inside this package), a directory, or a Hugging Face hub id such as facebook/opt-125m.
      workers: Processes. None: one for each core, fewer for a small text.
      text_key: The key or column of the text, in all files but text files.
      skip_bad_records: Leave out broken lines, bytes that are not UTF-8 and empty files, and count them.
    """
    from opt_jax.checkpoints import hub
    from opt_jax.data.command import tokenize_sources

    array = None if output is None else hub.disk_path(output)
    _print(tokenize_sources(sources, array, tokenizer, workers, skip_bad_records, text_key) + "\n")


def convert() -> None:
    """Convert a checkpoint to Orbax or Hugging Face safetensors; inspect one; compare two."""


def train() -> None:
    """Train a model, or fine-tune one."""


COMMANDS = {
    "generate": generate,
    "convert": convert,
    "train": train,
    "eval": evaluate,
    "tokenize": tokenize,
    "plot": plot,
    "compress": compress_model,
}
# These parse their own options. In a wheel they are modules of this package; in a checkout they are beside it.
PROGRAMS = {"convert": "convert.__main__", "train": "train"}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. An error of the user is one line on stderr."""
    args = sys.argv[1:] if args is None else list(args)
    keep_standard_descriptors()
    if args in (["--version"], ["-V"]):
        print(f"opt-jax {opt_jax.__version__}")
        return 0
    if args and args[0] in PROGRAMS:
        return _program(args[0]).run(args[1:], f"opt-jax {args[0]}") or 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets "?"
    # Inside of JAX a KeyboardInterrupt may be lost. The commands without JAX clean up files and processes with it.
    interruption = raises() if args[:1] in (["plot"], ["tokenize"]) else ends_at_once("opt-jax: interrupted")
    try:
        with interruption, warning_lines("opt-jax: "):
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="opt-jax",
                description="OPT language models in JAX. --version shows the version.",
                args=args,
            )
    except BrokenPipeError:  # the pipe has no reader any more; Python would print an error when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as after SIGPIPE
    except (ValueError, OSError) as error:
        print(f"opt-jax: error: {error_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("opt-jax: interrupted", file=sys.stderr)
        return exit_code(interrupt)
    return 0


def _program(name: str) -> Any:
    package = f"opt_jax.{name}"
    if importlib.util.find_spec(package) is None:
        beside = Path(__file__).parents[1] / name
        path = beside / "__init__.py" if beside.is_dir() else beside.with_suffix(".py")
        spec = importlib.util.spec_from_file_location(package, path)
        assert spec is not None and spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"opt_jax.{PROGRAMS[name]}")


def _print(text: str) -> None:
    print(text, end="", flush=True)  # does nothing if stdout is closed (`>&-`)


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError('no prompt: pass one, as in opt-jax generate "def main():", or pipe it in')
    text = sys.stdin.buffer.read().decode("utf-8", errors="replace").removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("no prompt: standard input is empty")
    return text


if __name__ == "__main__":
    sys.exit(main())
