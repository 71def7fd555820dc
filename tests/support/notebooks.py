"""Runs the notebooks of examples/ and stores their outputs: `make notebooks`.

    python tests/support/notebooks.py [NOTEBOOK ...]

`differences` says where outputs are not those that a notebook stores. Tests run on processors of other kinds, with code
that is compiled without optimizations, so it cannot compare bytes. The rule:

- The same cells print, and show pictures. What a picture shows is not compared.
- Words, punctuation and integers are equal. White space does not count.
- Numbers with a decimal point or an exponent, and percentages, differ by at most 5 percent, or by two units of their
  last digit.
- A cell tagged `varies` (times, memory, text that is sampled) only has outputs of the same kinds.
"""

import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?(?!\w)(?:\s*%)?")


def read(path: Path) -> Any:
    """The notebook in a file."""
    return nbformat.read(path, as_version=4)


def stored(notebook: Any) -> str:
    """The text of a notebook's file. It depends on nothing but the cells and what they print and show."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if "tags" in cell.metadata else {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _small(output.data["image/png"])
    return nbformat.writes(notebook) + "\n"


def _small(picture: str) -> str:
    """A PNG in base64 with at most 256 colours, and nothing about who wrote it: a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    file = io.BytesIO()
    image.convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(notebook: Any, directory: Path) -> Any:
    """A copy of the notebook, with the outputs that it has today.

    Args:
      notebook: its code.
      directory: where its code runs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raises.
    """
    executed: Any = nbformat.from_dict(notebook)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(directory)}}
    client = nbclient.NotebookClient(executed, timeout=300, resources=resources, record_timing=False)
    client.coalesce_streams = True  # one text for all that a cell prints, however the kernel has cut it
    client.extra_arguments = ["--log-level=ERROR"]  # no warning of the kernel's that its connection is not encrypted
    return client.execute()


def outputs(cell: Any) -> list[tuple[str, str]]:
    """The kind and the text of each output of a cell; the text of pictures is empty."""
    pairs = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            pairs.append((output.name, output.text))
        elif output.output_type == "error":
            pairs.append(("error", output.evalue))
        else:
            kind = "+".join(sorted(output.data))
            pairs.append((kind, "" if "image/png" in output.data else output.data.get("text/plain", "")))
    return pairs


def differences(before: Any, today: Any) -> list[str]:
    """Where two runs of a notebook have other outputs, by the rule above; [] if nowhere."""
    lines = []
    for number, (old, new) in enumerate(zip(before.cells, today.cells, strict=True)):
        was, now = outputs(old), outputs(new)
        if [kind for kind, _ in was] != [kind for kind, _ in now]:
            lines.append(f"cell {number}: {[kind for kind, _ in was]} became {[kind for kind, _ in now]}")
        elif "varies" not in old.metadata.get("tags", []):
            lines += [f"cell {number}: {text}" for a, b in zip(was, now, strict=True) for text in _compare(a[1], b[1])]
    return lines


def _compare(before: str, today: str) -> list[str]:
    words = [" ".join(_NUMBER.sub(" # ", text).split()) for text in (before, today)]
    if words[0] != words[1]:
        return [f"{before!r} became {today!r}"]
    pairs = zip(_NUMBER.findall(before), _NUMBER.findall(today), strict=True)
    return [f"{old} became {new}" for old, new in pairs if not _close(old, new)]


def _close(old: str, new: str) -> bool:
    a, b = (float(text.rstrip("% ").replace(",", "")) for text in (old, new))
    unit = min(_unit(text.rstrip("% ")) for text in (old, new))  # NumPy prints 1. beside 0.99
    if unit == 1 and not set(old + new) & set("e%"):
        return a == b
    return abs(a - b) <= max(0.05 * max(abs(a), abs(b)), 2.01 * unit)


def _unit(number: str) -> float:
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def main(*paths: str) -> None:
    """Run notebooks, by default all, and store their outputs."""
    for path in [Path(path) for path in paths] or sorted(EXAMPLES.glob("*.ipynb")):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            path.write_text(stored(execute(read(path), Path(directory))))
        print(f"{path.name}: {time.monotonic() - start:.0f} seconds, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
