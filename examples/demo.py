"""opt-jax in a minute on a CPU: convert a PyTorch checkpoint, restore it, generate, train, resume. `make demo` runs it.

    python examples/demo.py [DIRECTORY]

DIRECTORY must not exist. The default is runs/demo, which is removed first. Every step is a command that you can type
yourself; the script prints it and then runs it.
"""

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = "runs/demo"

PROMPTS = (
    'def read_lines(path):\n    """',
    "class Queue:\n    def __init__(self",
)


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


def run(program: str, *arguments: str) -> None:
    """Print a command as you would type it, then run it in this interpreter's environment."""
    print("$", shlex.join([program, *arguments]), flush=True)
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run([tools / program, *arguments], check=True, cwd=REPOSITORY, env=environment)


def main(directory: str = OURS) -> None:
    start = time.monotonic()
    if directory == OURS:
        shutil.rmtree(REPOSITORY / directory, ignore_errors=True)
    elif (REPOSITORY / directory).exists():
        sys.exit(f"demo: {directory} exists already: name a new directory")

    heading("1. Convert: the embedded checkpoint, in the layout of PyTorch transformers, to Orbax")
    run("python", "-m", "convert", "tiny", f"{directory}/tiny")

    heading("2. Generate: restore the Orbax checkpoint, and print the text as it is produced")
    run("opt-jax", "generate", "--model", f"{directory}/tiny", "--max-new-tokens", "64", *PROMPTS)

    heading("3. Continue its training on sources of the standard library: 20 steps, stopping after 10")
    sources = Path(asyncio.__file__).parent
    train = ["python", "train.py", "--model", f"{directory}/tiny", "--output", f"{directory}/training", "--steps", "20"]
    train += ["--data", str(sources), *"--batch-size 8 --seq-len 64 --learning-rate 1e-4".split()]
    train += "--warmup-steps 5 --log-every 5 --eval-batches 4".split()
    run(*train, "--stop-after", "10")
    heading("4. The same command again: it resumes by itself")
    run(*train)

    heading(f"Done in {time.monotonic() - start:.0f} seconds. Next:")
    suggestions = {
        'opt-jax generate "def "': "a prompt of your own (--help: sampling, length, ...)",
        f'opt-jax generate --model {directory}/training "def "': "the model just trained",
        "python train.py": "a model trained from scratch, in a few minutes",
        "python -m convert facebook/opt-125m opt-125m": "Meta's own weights (downloads 250 MB)",
        'opt-jax generate --model opt-125m "In the city of"': "",
        "examples/quickstart.ipynb": "logits, hidden states, gradients, attention",
        "examples/looking_inside.ipynb": "which heads close a bracket: lenses, patching, attribution",
    }
    print("  source .venv/bin/activate")
    for command, purpose in suggestions.items():
        print(f"  {command:<52}{purpose}".rstrip())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as e:
        sys.exit(f"demo: the command above failed (exit code {e.returncode})")
