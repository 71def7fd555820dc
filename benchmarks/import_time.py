"""What `import opt_jax` adds to `import jax, flax.nnx`: seconds, and packages.

    python benchmarks/import_time.py [ROUNDS]

Fresh interpreters, the programs in alternation, so that whatever else the machine does touches all alike. The names
of `opt_jax` load on first use; the last row uses them. Exits 1 when `import opt_jax` takes over 1.30 times the time of
the first row or loads a package that it promises not to import.
"""

import json
import statistics
import subprocess
import sys

BASE = "import jax, flax.nnx"
OURS = "import jax, flax.nnx, opt_jax"
USED = "from opt_jax import OPTForCausalLM, OPTTokenizer"
LIMIT = 1.30
# Needed by single functions or by other programs only; each is imported where it is used.
FORBIDDEN = {"convert", "grain", "matplotlib", "safetensors", "tokenizers", "torch", "transformers", "tyro"}

PROGRAM = """
import sys, time
start = time.perf_counter()
{imports}
seconds = time.perf_counter() - start
import json
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def measure(imports: str) -> tuple[float, set[str]]:
    """Seconds that the import statement took in a fresh interpreter, and the top-level modules loaded after it."""
    code = PROGRAM.format(imports=imports)
    run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, set(modules) - sys.stdlib_module_names


def main(rounds: int = 10) -> int:
    measure(USED)  # warm-up: bytecode caches and the operating system's file cache
    samples = [{imports: measure(imports) for imports in (BASE, OURS, USED)} for _ in range(rounds)]
    modules = {imports: loaded for imports, (_, loaded) in samples[-1].items()}

    print(f"{'median of ' + str(rounds):50}{'seconds':>8}{'ratio':>8}   packages added")
    ratios = {}
    for imports in (BASE, OURS, USED):
        ratios[imports] = statistics.median(sample[imports][0] / sample[BASE][0] for sample in samples)
        seconds = statistics.median(sample[imports][0] for sample in samples)
        added = sorted(name for name in modules[imports] - modules[BASE] if not name.startswith("_"))
        print(f"{imports:50}{seconds:>8.3f}{ratios[imports]:>8.2f}   {', '.join(added) or 'none'}")
    unwanted = FORBIDDEN & modules[OURS]
    print(f"limit {LIMIT:.2f}; unwanted packages loaded by `import opt_jax`: {', '.join(sorted(unwanted)) or 'none'}")
    return int(ratios[OURS] > LIMIT or bool(unwanted))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
