"""What `import opt_jax` adds to `import jax, flax.nnx`: seconds, and packages.

    python benchmarks/import_time.py [ROUNDS]

Fresh interpreters, the two programs in alternation, so that whatever else the machine does touches both alike. Exits 1 when the
median ratio is over 1.30 or when a package is loaded that the library promises not to import.
"""

import json
import statistics
import subprocess
import sys

BASE = "import jax, flax.nnx"
OURS = "import jax, flax.nnx, opt_jax"
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
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(imports=imports)], check=True, capture_output=True, text=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, set(modules)


def main(rounds: int = 10) -> int:
    measure(OURS)  # warm-up: bytecode caches and the operating system's file cache
    base, ours = [], []
    base_modules, our_modules = set(), set()
    for _ in range(rounds):
        seconds, base_modules = measure(BASE)
        base.append(seconds)
        seconds, our_modules = measure(OURS)
        ours.append(seconds)

    print(f"{'':32}{'median':>10}{'fastest':>10}")
    for name, times in ((BASE, base), (OURS, ours)):
        print(f"{name:32}{statistics.median(times):>8.3f} s{min(times):>8.3f} s")
    ratios = [b / a for a, b in zip(base, ours, strict=True)]
    ratio = statistics.median(ratios)
    print(f"{'ratio':32}{ratio:>8.3f}  {min(ours) / min(base):>8.3f}    (limit {LIMIT:.2f}, {rounds} rounds)")
    print("packages added:", ", ".join(sorted(our_modules - base_modules)) or "none")
    unwanted = sorted(FORBIDDEN & our_modules)
    print("unwanted packages:", ", ".join(unwanted) or "none")
    return int(ratio > LIMIT or bool(unwanted))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
