"""From a model's name (hub id, directory, "tiny") to a directory on this machine or in an object store (`gs://...`)."""

import importlib.resources
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from etils import epath

from opt_jax.checkpoints.download import Repository, download
from opt_jax.checkpoints.formats import foreign
from opt_jax.checkpoints.formats.weight_files import ADAPTER_CONFIG, WEIGHT_FILES
from opt_jax.system.messages import shown
from opt_jax.system.reading import json_object, read_small
from opt_jax.system.temporary import refuse_links, write_file

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Files that are copied along with a model's weights, besides config.json.
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")
RECIPE_FILE = "compression.json"  # of a compressed model: how it was made
_WEIGHTS = re.compile(r"(pytorch_|flax_)?model(-[0-9]+(-of-[0-9]+)?)?\.(safetensors|bin|msgpack)(\.index\.json)?")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Files that Orbax and TensorStore write into the directory of a tree.
_IN_PARAMS = re.compile(
    r"params/(_[A-Z_]*METADATA|_sharding|array_metadatas/process_\d+|checkpoint|commit_success\.txt|"
    r"(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32}))"
)
_DIRECTORIES = re.compile(r"params(/array_metadatas|(/ocdbt\.process_\d+)?(/d)?)")
_STEPS = ("checkpoints", "best")  # in a run directory of train.py: directories of checkpoints, named by their steps


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def as_path(name: str | os.PathLike) -> Path:
    """A path with the methods of `pathlib`, also for objects in a store. A leading `~` is the home directory.

    Raises:
      FileNotFoundError: an empty name.
      ValueError: `~NAME`, and there is no user of this name.
    """
    if os.fspath(name) == "":  # as of a shell's variable that is not set; a Path of it is the current directory
        raise FileNotFoundError("no directory or file '': the name is empty")
    if is_remote(name):
        return epath.Path(name)  # type: ignore[reportReturnType]
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}: no user of this name has a home directory here: give the absolute path") from None


def disk_path(name: str | os.PathLike) -> Path:
    """As `as_path`, for files that are written to a disk only.

    Raises:
      ValueError: the path is in an object store.
    """
    if is_remote(name):
        raise ValueError(f"{name}: this can only be written to a disk: name a path on one, and copy it from there")
    return as_path(name)


def write_into(directory: str | os.PathLike, name: str, content: bytes) -> None:
    """Write a file of this name into a directory, which is made if there is none.

    Raises:
      FileExistsError: the file is a symbolic link, or not a regular file.
      ValueError: see `disk_path`.
    """
    folder = disk_path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder / name)
    write_file(folder / name, content)


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()  # (epath's own `absolute` turns gs://... into /here/gs:/...)


# Paths that other libraries misread: Orbax looks for its files with a glob (* ? [), TensorStore reads a backslash as /,
# Orbax reads gs:/ anywhere as gs://, epath reads /s3/x as s3://x, and gcsfs reads a#b as version b of the object a.
_MISREAD = re.compile(r"[*?\[\\]|gs:/|^/(?:gs|s3|az|hf)/")
_MISREAD_REMOTE = re.compile(r"[*?\[\\#]")


def check_array_path(path: str | os.PathLike) -> None:
    """Raise ValueError for a directory in which Orbax would not find arrays again after writing them."""
    name = os.fspath(path)
    if is_remote(name):
        names, misread = [name], _MISREAD_REMOTE
    else:  # a run's model is written to its real path
        names, misread = [os.path.abspath(name), os.path.realpath(name)], _MISREAD
    for full in names:
        if (match := misread.search(f"{full}/")) or not _is_unicode(full):
            what = repr(match[0]) if match else "bytes that are no UTF-8"
            where = "" if full == name else f" (in {full})"
            raise ValueError(f"{path}: arrays would be lost under a path with {what}{where}: choose another name")


def _is_unicode(name: str) -> bool:
    return not any(0xD800 <= ord(c) < 0xE000 for c in name)


def array_url(path: Path) -> str:
    """The URL of a directory for TensorStore.

    Raises:
      ValueError: TensorStore would misread the path.
    """
    name = os.fspath(absolute(path))
    if "\\" in name or not _is_unicode(name):
        raise ValueError("TensorStore cannot open a path with a backslash or bytes that are no UTF-8")
    scheme, _, rest = name.partition("://") if is_remote(name) else ("file", "", name)
    return f"{scheme}://{quote(rest)}/"


def check_remote(name: str) -> None:
    """Check that a path in an object store can be used here.

    Raises:
      ValueError: epath does not know its scheme, a package for it is not installed, or this user has no access.
    """
    scheme = name.partition("://")[0]
    try:
        as_path(name).exists()
    except Exception as e:  # gcsfs and its authentication have errors of their own
        hint = ": pip install gcsfs" if scheme == "gs" and isinstance(e, ImportError) else ""
        raise ValueError(f"{name}: {scheme}:// cannot be used here ({e}){hint}") from None


def resolve(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The directory that holds the model `name`.

    Args:
      name: "tiny", the model inside this package; a directory (in a run directory of train.py: its exported `model`, or
        the newest checkpoint while there is none; RUN/best and RUN/checkpoints: the newest in it), which may be in
        Google Cloud Storage (`gs://...`; extra `gcs`) if its weights are an Orbax pytree; else the id of a repository
        on the Hugging Face hub, which is downloaded, or taken from the cache.
      revision: branch, tag or commit of a hub id.
      cache_dir: where downloads are kept; default: Hugging Face's cache.
      local_files_only: never download.
      weights: False leaves out the weights (for a tokenizer). Of several formats in a repository only the first is
        downloaded: safetensors, PyTorch's .bin, Flax's msgpack.

    Raises:
      FileNotFoundError, PermissionError, OSError: no such directory or repository, or see `download.download`.
      ValueError: `name` is a file (if its format is not read, the message names it); `revision` is given for a
        directory; a name in the directory is a broken link or not a file; or see `check_remote`.
    """
    name = os.fspath(name)
    if is_remote(name):
        check_remote(name)
    path = as_path(name)
    if name == "tiny":
        path = Path(str(importlib.resources.files("opt_jax") / "tiny"))
    if name and path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models on the hub, but {name} is a directory")
        path = _in_run(path)
        if weights and is_remote(path) and (path / "config.json").is_file() and not is_orbax(path):
            raise ValueError(f"{path} is not an Orbax directory: others are read from a disk only, so copy it to one")
        return _without_broken_names(path, weights)
    if name and path.exists():
        if (says := foreign.of_file(path)) is not None:
            raise ValueError(f"{name} is {says}")
        if (says := quantization_hint(path.parent)) and quantization(path.parent)[1] not in ("gptq", "opt-jax"):
            raise ValueError(f"{name}{says}")
        raise ValueError(f"{name} is a file; give the directory it is in")
    if name == "tiny" or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no directory {name!r}" + (" in this package" if name == "tiny" else ""))
    small_files = (*COMPANION_FILES, *QUANTIZATION_FILES)
    folder = download(Repository(name, revision, cache_dir, local_files_only), small_files, weights)
    return _without_broken_names(folder, weights)


def resolve_adapter(
    name: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None, local_files_only: bool = False
) -> Path:
    """The directory that holds the PEFT adapter `name`: a directory, on a disk or in an object store, or a hub id.

    Args:
      name: the directory or hub id.
      cache_dir, local_files_only: see `resolve`.

    Raises:
      FileNotFoundError, PermissionError, OSError: no such directory or repository, or see `download.download`.
      ValueError: `name` is a file; or see `check_remote`.
    """
    name = os.fspath(name)
    if is_remote(name):
        check_remote(name)
    path = as_path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file; give the directory that it is in, with {ADAPTER_CONFIG}")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no PEFT adapter at {name}: no such directory")
    return download(Repository(name, None, cache_dir, local_files_only, adapter=True), (), weights=True)


def _without_broken_names(directory: Path, weights: bool) -> Path:
    """The directory, after checking that each name in it that would be read is a regular file.

    (Ignoring a broken link or a pipe would load other weights than intended, or a tokenizer without its settings.)

    Raises:
      ValueError: a name is not a regular file.
    """
    names = ("config.json", *COMPANION_FILES, *((*WEIGHT_FILES, "params/_METADATA") if weights else ()))
    for folder in () if is_remote(directory) else companion_directories(directory):
        for path in (folder / name for name in names):
            if os.path.lexists(path) and not path.is_file():
                what = "is not a regular file" if path.exists() else f"is a link to {os.readlink(path)}, which is gone"
                raise ValueError(f"{path} {what}: put the file there, or remove this name")
    return directory


def _in_run(path: Path) -> Path:
    """The model in a run directory of train.py; any other directory is returned unchanged."""
    if (path / "model" / "config.json").is_file():
        return path / "model"
    steps = steps_of_run(path)
    if steps is None:
        return path
    path = path / "checkpoints" if (path / "run.json").is_file() else path
    if not steps:
        raise FileNotFoundError(f"{path.parent} is a training run without a checkpoint yet: none in {path}")
    if not (steps[-1] / "params" / "_METADATA").is_file():
        before = f", or take the one before it, {steps[-2]}" if len(steps) > 1 else ""
        raise ValueError(f"checkpoint {steps[-1]} is damaged, without params/_METADATA: copy it from elsewhere{before}")
    return steps[-1]


def steps_of_run(path: Path) -> list[Path] | None:
    """The checkpoints in a run directory of train.py, or in its `checkpoints` or `best`, in the order of their steps.

    None if `path` is none of these.
    """
    if (path / "run.json").is_file() and not (path / "config.json").is_file():
        path = path / "checkpoints"
    elif not (path.name in _STEPS and (absolute(path).parent / "run.json").is_file()):
        return None
    return sorted((step for step in path.glob("*") if _is_finished_step(step)), key=lambda step: int(step.name))


def by_number(path: Path) -> list[tuple[int, str]]:
    """A key that sorts by the numbers in the names: step2 before step10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _is_finished_step(path: Path) -> bool:
    """Whether the directory is a finished checkpoint, named by its step.

    Orbax renames a finished checkpoint to this name; in an object store, where it cannot, it writes a file at the end.
    An empty directory is left by a process that was killed while removing it.
    """
    if not path.name.isdecimal() or not path.is_dir():
        return False
    return (path / "commit_success.txt").is_file() if is_remote(path) else any(path.iterdir())


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether the directory is an Orbax model directory (of `save_pretrained`, `python -m convert`)."""
    return (as_path(path) / "params" / "_METADATA").is_file()


def is_model(path: str | os.PathLike) -> bool:
    """Whether the directory is a model in one of the two forms that this project writes, Orbax and Hugging Face."""
    path = as_path(path)
    has_weights = any((path / name).is_file() for name in WEIGHT_FILES)
    return is_orbax(path) or has_weights and (path / "config.json").is_file()


def is_model_file(name: str) -> bool:
    """Whether a file or directory of this name in a model directory is a part of the model."""
    return name in ("params", "config.json", RECIPE_FILE, *COMPANION_FILES) or _WEIGHTS.fullmatch(name) is not None


def foreign_file(path: Any) -> str | None:
    """The name of an entry in a model directory that is not part of the model, or None.

    A directory under the name of a model's file counts as one, and a file under the name of a directory.
    """
    return min(_foreign_below(path), default=None)


def _foreign_below(folder: Any, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        name = prefix + entry.name
        is_file = _IN_PARAMS.fullmatch(name) is not None or name != "params" and is_model_file(name)
        # In an object store `is_dir` takes a request, and there are thousands of chunks.
        if is_file and (is_remote(entry) or not entry.is_dir()):
            continue
        if _DIRECTORIES.fullmatch(name) and entry.is_dir():
            yield from _foreign_below(entry, f"{name}/")
        else:
            yield name


def _run_of(directory: str | os.PathLike) -> Path | None:
    """The run directory of train.py if `directory` is one of its checkpoints (`RUN/checkpoints/<step>`), else None."""
    path = as_path(directory if is_remote(directory) else os.path.abspath(directory))
    run = path.parent.parent
    inside = path.parent.name in _STEPS and (run / "run.json").is_file()
    return run if inside and not (path / "config.json").is_file() else None


def config_file(directory: str | os.PathLike) -> Path:
    """The file with the configuration of a model directory; for a checkpoint of train.py, the run's `run.json`."""
    run = _run_of(directory)
    return as_path(directory) / "config.json" if run is None else run / "run.json"


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of the configuration in `config_file`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a JSON object, or see `read_small`.
    """
    path = config_file(directory)
    if not path.is_file():
        hint = shards_hint(directory) or ("" if is_remote(path) else foreign.hint_of_directory(path.parent))
        raise FileNotFoundError(f"no OPT configuration at {path}{hint}")
    content = json_object(read_small(path), path)
    if path.name == "config.json":
        return content
    if not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} has no object 'model', so it is not a record of train.py")
    architectures = {"architectures": ["OPTForCausalLM"]}
    options = content.get("options")
    task = options.get("task") if isinstance(options, dict) else None
    return architectures | content["model"] if task else content["model"] | architectures


_QUANTIZERS = {
    "awq": "an AWQ",
    "bitsandbytes": "a bitsandbytes",
    "compressed-tensors": "a compressed-tensors",
    "fp8": "an FP8",
    "gptq": "a GPTQ",
    "opt-jax": "an opt-jax",
}
_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # AutoGPTQ's and AutoAWQ's
QUANTIZATION_FILES = ("config.json", *_OLD_FILES)


def quantization(directory: str | os.PathLike) -> tuple[str, Any, dict[str, Any]]:
    """(name of the file, method, settings) of the quantization of the model in `directory`; empty without one."""
    for name in QUANTIZATION_FILES:
        path = as_path(directory) / name
        try:
            content = json_object(read_small(path), path) if path.is_file() else {}
        except ValueError:
            continue
        settings = content.get("quantization_config") if name == "config.json" else content
        if isinstance(settings, dict) and settings:
            old = any(key in settings for key in ("load_in_8bit", "load_in_4bit"))  # old versions wrote no quant_method
            method = settings.get("quant_method", "bitsandbytes" if old else _OLD_FILES.get(name))
            return name, method.lower() if isinstance(method, str) else method, settings
    return "", None, {}


def quantization_hint(directory: str | os.PathLike) -> str:
    """A hint for error messages about the model in `directory`: the kind of its quantization; "" without one."""
    name, method, settings = quantization(directory)
    if not settings:
        return ""
    known = _QUANTIZERS.get(method, f"a {method[:40]!r}") if isinstance(method, str) else None
    kind = known or f"a quantized (quant_method {shown(method, 40)})"
    what = "in a form that is not" if method in ("gptq", "opt-jax") else "which is not"
    if method == "bitsandbytes":
        what = "of which only 8 bits (load_in_8bit) are"
    return (
        f": this is {kind} checkpoint ({name}), {what} supported: take the model that was quantized, or let "
        "transformers dequantize it (model.dequantize(), save_pretrained)"
    )


ZERO_3_HINT = (
    ": DeepSpeed ZeRO-3 has each process save its part of the weights: run the script that it puts beside them, "
    "`python zero_to_fp32.py . DIRECTORY`, and put config.json into DIRECTORY"
)


def shards_hint(directory: str | os.PathLike) -> str:
    """A hint for error messages: what to do with a PEFT adapter, or with what several processes wrote; or ""."""
    path = as_path(directory)
    if is_remote(path) or not path.is_dir():
        return ""
    if (path / ADAPTER_CONFIG).is_file():
        return ": this is a PEFT adapter; give its base as the model, and this as its adapter (adapter=, --adapter)"
    places = [path, *sorted(entry for entry in path.iterdir() if entry.is_dir())]
    for place in places:
        if (place / ".metadata").is_file():
            command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
            file = path / WEIGHT_FILES[2]
            return f": {place} is of torch.distributed.checkpoint (FSDP): run `{command} {place} {file}`"
        if any(place.glob("zero_pp_rank_*_model_states.pt")):
            return ZERO_3_HINT
        if (place / "mp_rank_01_model_states.pt").is_file():
            return f": {place} has the model-parallel parts of DeepSpeed: save the model from the code that made them"
    return ""


def companion_directories(directory: str | os.PathLike) -> tuple[Path, ...]:
    """The directories with COMPANION_FILES of a model, in order of preference. A run of train.py has `tokenizer/`."""
    run = _run_of(directory)
    return (as_path(directory),) if run is None else (as_path(directory), run / "tokenizer")
