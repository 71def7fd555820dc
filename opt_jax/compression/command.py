"""`opt-jax compress`: the command line of `compress`."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

Integer = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER")]


@dataclasses.dataclass(frozen=True)
class CompressOptions:
    """Quantise or prune the matrices of a model's layers. After a kill, the same command goes on."""

    model: Annotated[str, tyro.conf.Positional]
    """"tiny" (the model inside this package), a directory, or a Hugging Face hub id such as facebook/opt-125m."""
    method: Literal["rtn", "gptq", "awq", "smoothquant", "magnitude", "wanda", "sparsegpt"]
    """rtn: round to nearest. smoothquant: 8-bit weights and activations. magnitude, wanda, sparsegpt: prune."""
    output: Path
    """The new model directory."""
    bits: Integer = None
    """Of the weights, 2 to 8. Default: 4. sparsegpt: also quantise what it does not prune."""
    group_size: Integer = None
    """How many inputs share a scale. Default: all inputs of an output."""
    symmetric: bool = False
    """Scales without zeros."""
    act_order: bool = False
    """gptq: the inputs with the largest activations first."""
    true_sequential: bool = False
    """Calibrate a matrix with what compressed matrices before it in the layer give: four passes instead of one."""
    damping: Number = None
    """gptq, sparsegpt: added to the Hessian's diagonal, as a share of its mean. Default: 0.01."""
    alpha: Number = None
    """smoothquant: how much of the activations' range moves into the weights, 0 to 1. Default: 0.5."""
    sparsity: Annotated[str | None, tyro.conf.arg(metavar="SHARE|N:M")] = None
    """The share of weights that become 0, or 2:4: two of each four. Default: 0.5."""
    calibration: tuple[str, ...] = ()
    """Texts for the statistics of activations, as in opt-jax eval --data."""
    samples: Integer = None
    """Windows of these texts. Default: 128."""
    window: Integer = None
    """Tokens of a window. Default: 2048, or the model's context if that is less."""
    seed: Integer = None
    """Of the places of windows. Default: 0."""
    rows: Literal["blank-lines", "spaces", "c4"] | None = None
    """blank-lines, spaces: windows of all rows, joined. c4: windows of single rows that are long enough. Default: c4,
    unless there is one row."""
    text_key: str | None = None
    """The key or column of the text, in all files but text files. Default: text."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of computation with calibration texts. Default: float32 on a CPU, else as stored (on a TPU bfloat16 for
    float16)."""
    mesh: str | None = None
    """Shard layers and samples over devices, as in data=2,fsdp=4. Default: one device."""
    verify: bool = True
    """Compare the weights of an Orbax directory with their checksums."""


def compress_model(options: Annotated[CompressOptions, tyro.conf.arg(name="")]) -> None:
    """Quantise or prune the matrices of a model's layers. After a kill, the same command goes on."""
    from opt_jax.compression._compress import compress
    from opt_jax.parallel.mesh import make_mesh

    arguments = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    arguments |= dict(
        calibration=options.calibration or None, mesh=None if options.mesh is None else make_mesh(options.mesh)
    )
    begin = time.perf_counter()

    def show(done: int, layers: int, errors: dict[str, float]) -> None:
        shown = "  ".join(f"{name.rpartition('.')[2]} {error:.2e}" for name, error in errors.items())
        print(f"layer {done}/{layers}  {shown}  {time.perf_counter() - begin:.1f} s", flush=True)

    report = compress(**arguments, progress=show)
    what = "outputs on the calibration samples" if report["error_of"] == "outputs" else "weights"
    mean = sum(sum(errors.values()) for errors in report["errors"]) / sum(map(len, report["errors"]))
    print(f"mean squared change of the {what}, relative to their square: {mean:.2e}", file=sys.stderr)
    print(options.output)
