"""Training data: files -> documents -> one stream of token ids -> windows in an order fixed by (seed, step). No jax.

Everything here is a pure function of the files, the tokenizer and the seed, so a run needs no iterator state: the
batch of step n is computed from n, on any number of hosts, before and after any resume.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from opt_jax.text import OPTTokenizer

TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
# Ids 0 to 3 of every OPT vocabulary; `</s>` is BOS and EOS at once, and the separator between documents.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
# Not prose and not what anybody wants to imitate: tests, charmap tables, other people's packages.
STDLIB_SKIP = {"__pycache__", "encodings", "idle_test", "site-packages", "dist-packages", "test", "tests"}


def stdlib_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(_walk(root, skip=STDLIB_SKIP, suffixes=(".py",)))


def find_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files as given, directories searched for `TEXT_SUFFIXES`, sorted within each directory.

    Raises FileNotFoundError for a path that is not there, ValueError for a directory without text files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(_walk(path, skip={"__pycache__", ".git"}, suffixes=TEXT_SUFFIXES))
            if not found:
                raise ValueError(f"{path}: no text files below this directory (looked for {', '.join(TEXT_SUFFIXES)})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or directory")
    return files


def _walk(root: Path, skip: set[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in skip]
        yield from (Path(directory, name) for name in names if name.endswith(suffixes))


def read_documents(files: Iterable[Path]) -> list[str]:
    """A text file is one document; a `.jsonl` file has one per line, under the key "text". Blank ones are left out.

    Raises ValueError naming file and line for bytes that are not UTF-8 and for lines that are not {"text": "..."}.
    """
    documents = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        documents += _jsonl(path, text) if path.suffix == ".jsonl" else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError("no documents in the data: every file is empty")
    return documents


def _jsonl(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise ValueError(f'{path}:{number}: expected an object with a string under "text"')
        yield document["text"]


def split_documents(documents: list[str], fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """(training documents, held-out ones): a fixed random `fraction` of the documents, whatever the run's seed.

    With too few documents to spare any (fewer than 1 / fraction) the tail of each one is held out instead.
    """
    count = int(len(documents) * fraction)
    if count == 0:
        cuts = [int(len(document) * (1 - fraction)) for document in documents]
        pairs = list(zip(documents, cuts, strict=True))
        return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]
    held_out = set(np.random.default_rng(0).permutation(len(documents))[:count].tolist())
    training = [document for i, document in enumerate(documents) if i not in held_out]
    return training, [documents[i] for i in sorted(held_out)]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> OPTTokenizer:
    """A byte-level BPE tokenizer learned from the documents, with OPT's special ids."""
    if vocab_size < len(SPECIAL_TOKENS) + 256:
        raise ValueError(
            f"a vocabulary of {vocab_size} does not hold {len(SPECIAL_TOKENS)} special tokens and 256 bytes"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return OPTTokenizer(tokenizer)


def tokenizer_to_bytes(tokenizer: OPTTokenizer) -> bytes:
    """All of a tokenizer, for another process or another file system."""
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(directory).iterdir())}
    return json.dumps(files).encode()


def tokenizer_from_bytes(data: bytes) -> OPTTokenizer:
    with TemporaryDirectory() as directory:
        for name, text in json.loads(data).items():
            Path(directory, name).write_text(text, encoding="utf-8")
        return OPTTokenizer.from_pretrained(directory)


def save_tokenizer(tokenizer: OPTTokenizer, directory: epath.Path) -> None:
    """Write the tokenizer's files, in place of those of a start that was killed before it had begun."""
    if directory.exists():
        directory.rmtree()
    directory.mkdir(parents=True)
    for name, text in json.loads(tokenizer_to_bytes(tokenizer)).items():
        (directory / name).write_bytes(text.encode())


def read_tokenizer(directory: epath.Path) -> OPTTokenizer:
    """What `save_tokenizer` has written."""
    return tokenizer_from_bytes(
        json.dumps({path.name: path.read_bytes().decode() for path in directory.iterdir()}).encode()
    )


def tokenize(documents: Sequence[str], tokenizer: OPTTokenizer) -> np.ndarray:
    """One int32 stream: `</s>` document `</s>` document ... `</s>`. Documents start behind `</s>`, as prompts do."""
    separator = np.array([tokenizer.bos_token_id], np.int32)
    parts = [separator]
    for row in tokenizer(list(documents), return_tensors=None, add_special_tokens=False).input_ids:
        parts += [np.asarray(row, np.int32), separator]
    return np.concatenate(parts)


def fingerprint(tokens: np.ndarray) -> str:
    """A short hash of a token stream: tells a resumed run that the files or the tokenizer have changed."""
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:16]


class Windows:
    """Contiguous windows of `seq_len + 1` ids over a stream: `seq_len` inputs, and each one's next id as target.

    Neighbours share one id, so an epoch predicts every id once. `rows(step)` is the global batch of that step, whoever
    asks: the windows of epoch e are a permutation drawn from (seed, e), and batches walk through the epochs end to end.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int = 0):
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise ValueError(f"{len(tokens)} tokens do not fill one window of seq_len + 1 = {seq_len + 1}")
        self._spare = (len(tokens) - 1) % seq_len
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def _order(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            # The remainder that fills no window is left out in front or at the back, a different share in each epoch.
            self._epoch = epoch, int(rng.integers(self._spare + 1)), rng.permutation(self.count)
        return self._epoch[1:]

    def starts(self, step: int) -> np.ndarray:
        """[batch_size] offsets into the stream: the rows of this step's batch."""
        starts = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            offset, order = self._order(position // self.count)
            starts.append(offset + int(order[position % self.count]) * self.seq_len)
        return np.array(starts, np.int64)

    def rows(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """[batch_size, seq_len + 1] int32, or only the given rows of it (what one host of many needs)."""
        return self.tokens[self.starts(step)[rows, None] + np.arange(self.seq_len + 1)]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The rows as inputs and labels, [rows, seq_len] each: the last id of a row is a label only, the first an input
        only."""
        ids = self.rows(step, rows)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
