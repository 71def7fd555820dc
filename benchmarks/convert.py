"""Converting and loading a checkpoint: ours, a plain torch.load + Orbax save, and `cp`, in alternation.

    python benchmarks/convert.py                       # 1.3B-shaped float16 .bin files, 2.6 GB
    python benchmarks/convert.py --from-orbax              # ... from an Orbax directory: to-hf, and from_pretrained
    python benchmarks/convert.py --model 6.7b --no-torch   # 13.3 GB: more than the torch path can do in 24 GB of memory

Makes a synthetic checkpoint in --directory and deletes it afterwards; needs four times its size there. Times include
flushing the disk's cache (`sync`), memory is the peak RSS of the child process, and `over imports` is that less what it
is after the imports. The floor is the bytes to be read and written at the rate of `cp`, which neither transposes nor
checks anything. The bound: two of the largest tensors + 512 MB over the imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# This script is called like the package that it measures: keep its directory from being searched first.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

TORCH_PATH = """
import json, sys
from pathlib import Path
import numpy as np, orbax.checkpoint as ocp, torch
src, dst = map(Path, sys.argv[1:])
index = json.loads((src / "pytorch_model.bin.index.json").read_text())["weight_map"]
tree = {}
for file in sorted(set(index.values())):
    for name, tensor in torch.load(src / file, weights_only=True).items():
        array = tensor.numpy()
        tree[name] = np.ascontiguousarray(array.T) if array.ndim == 2 and "embed" not in name else array
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(dst.absolute(), tree)
"""
OURS = "import sys; from convert.__main__ import main; sys.exit(main([*sys.argv[1:], '--quiet']))"
TO_HF = "import sys; from convert.__main__ import main; sys.exit(main(['to-hf', *sys.argv[1:], '--quiet']))"
LOAD = """
import sys
import jax
from flax import nnx
from opt_jax import OPTForCausalLM
jax.block_until_ready(nnx.state(OPTForCausalLM.from_pretrained(sys.argv[1], dtype="auto")))
"""
IMPORTS = "import convert.to_orbax, convert.source"
SETTLE = 6.0  # seconds
TORCH_IMPORTS = "import torch, orbax.checkpoint"


def write_checkpoint(directory: Path, model: str, form: str) -> tuple[int, int]:
    """Write a float16 checkpoint in shards below 2 GB. Returns (bytes of all tensors, bytes of the largest)."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from opt_jax import OPTConfig, OPTForCausalLM
    from opt_jax.checkpoints.formats import hf
    from opt_jax.checkpoints.pretrained import expected_shapes

    config = OPTConfig.preset(model)
    directory.mkdir()
    content = config.to_hf() | {"architectures": ["OPTForCausalLM"], "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(content))
    noise = np.random.default_rng(0).integers(0, 0x7000, 1 << 24, np.uint16).view(np.float16)  # finite float16s
    shapes = [hf.stored_as(path, shape) for path, shape in expected_shapes(OPTForCausalLM, config)]
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    suffix, stem = (".bin", "pytorch_model") if form == "bin" else (".safetensors", "model")
    count = 0

    def flush() -> None:
        nonlocal count, shard
        count += 1
        file = f"{stem}-{count:05d}{suffix}"
        weight_map.update(dict.fromkeys(shard, file))
        torch.save(shard, directory / file) if form == "bin" else save_file(shard, directory / file)
        shard = {}

    for name, shape in shapes:
        if sum(t.nbytes for t in shard.values()) > 1.5e9:
            flush()
        shard[name] = torch.from_numpy(np.resize(np.roll(noise, len(weight_map) + len(shard)), shape))
    flush()
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [2 * int(np.prod(shape)) for _, shape in shapes]
    return sum(sizes), max(sizes)


def measure(command: list[str], dst: Path | None) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak RSS in bytes) of a child process. `dst` is removed first."""
    if dst is not None:
        shutil.rmtree(dst, ignore_errors=True)
    os.sync()
    # A virtual machine returns freed memory to its host within seconds, and gets it back page by page. Without a wait,
    # a process that starts right after the removal above would write into memory that is still there.
    time.sleep(SETTLE)
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{command[:2]} failed")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.3b", help="one of the presets (default: 1.3b)")
    parser.add_argument("--form", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--from-orbax", action="store_true", help="read an Orbax directory: to-hf, and from_pretrained")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true", help="leave out the torch path (it needs twice the model)")
    parser.add_argument("--directory", type=Path, default=None, help="where there is room (default: the system's /tmp)")
    args = parser.parse_args()
    if args.form == "safetensors" and not (args.no_torch or args.from_orbax):
        parser.error("the torch path reads .bin files: give --no-torch with --form safetensors")

    work = Path(tempfile.mkdtemp(prefix="opt-jax-convert-", dir=args.directory))
    try:
        src, dst = work / "src", work / "dst"
        # In a child: what is resident in this process would count as the children's until they start their program.
        command = [sys.executable, __file__, "--make", str(src), args.model, args.form]
        total, largest = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        python = [sys.executable, "-c"]
        ours = {"opt-jax": [*python, OURS, str(src), str(dst)]}
        if args.from_orbax:
            subprocess.run([*python, OURS, str(src), str(work / "orbax")], check=True, stdout=subprocess.DEVNULL)
            src = work / "orbax"
            load = [*python, LOAD, str(src)]
            ours = {"to-hf": [*python, TO_HF, str(src), str(dst)], "from_pretrained, as stored": load}
        commands = {**ours, "cp": ["cp", "-r", str(src), str(dst)]}
        imports = dict.fromkeys(ours, measure([*python, IMPORTS], None)[2]) | {"cp": 0.0}
        if not (args.no_torch or args.from_orbax):
            commands["torch.load + Orbax"] = [*python, TORCH_PATH, str(src), str(dst)]
            imports["torch.load + Orbax"] = measure([*python, TORCH_IMPORTS], None)[2]
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                runs[name].append(measure(command, dst))
        print(
            f"\n{args.model}, float16 {args.form}, {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; "
            f"bound on memory over imports: {(2 * largest + 512e6) / 1e6:.0f} MB\n"
        )
        print("| | seconds (median) | spread | GB/s | CPU seconds | peak RSS, MB | over imports, MB | speed / cp |")
        print("|---|---|---|---|---|---|---|---|")
        cp = statistics.median(run[0] for run in runs["cp"])
        for name, results in runs.items():
            seconds, cpu, rss = (statistics.median(run[i] for run in results) for i in range(3))
            spread = f"{min(r[0] for r in results):.1f}-{max(r[0] for r in results):.1f}"
            print(
                f"| {name} | {seconds:.1f} | {spread} | {total / seconds / 1e9:.2f} | {cpu:.1f} | {rss / 1e6:.0f} | "
                f"{(rss - imports[name]) / 1e6:.0f} | {cp / seconds:.2f}x |"
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        print(*write_checkpoint(Path(sys.argv[2]), *sys.argv[3:]))
    else:
        main()
