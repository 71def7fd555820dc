"""The task of sequence classification: texts and labels from tab-separated files, and accuracy. Does not use JAX."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.system.reading import read_small
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.training.tasks.common import LARGEST_FILE, Batches, evaluate, hold_out, named_files

_HEADERS = {("sentence", "label"), ("text", "label")}  # or with the columns swapped


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, as pairs of line number and text.

    Raises:
      ValueError: a line (named) is not UTF-8.
    """
    data = read_small(path, LARGEST_FILE)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason})") from None
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    return [(number, line) for number, line in lines if line.strip()]


def read_tsv(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts and the labels of files with lines `text TAB label`.

    A first line `sentence TAB label` or `text TAB label`, or with the columns swapped, is a header. It gives the order
    of the columns in its file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line (named) does not have this form, there are no examples, or the columns seem to be swapped.
    """
    texts, labels = [], []
    for path in named_files(paths):
        columns = (0, 1)
        for number, line in read_lines(path):
            parts = [part.strip() for part in line.split("\t")]
            header = tuple(part.lower() for part in parts)
            if number == 1 and (header in _HEADERS or header[::-1] in _HEADERS):
                columns = (0, 1) if header in _HEADERS else (1, 0)
                continue
            if len(parts) != 2 or not all(parts):
                raise ValueError(f"{path}:{number}: expected a text, a tab and a label, found {line[:60]!r}")
            texts.append(parts[columns[0]])
            labels.append(parts[columns[1]])
    if not texts:
        raise ValueError(f"{', '.join(paths)}: no examples")
    if (distinct := len(set(labels))) > len(set(texts)):
        raise ValueError(
            f"{', '.join(paths)}: {distinct} different labels, more than texts: put the text first, then a tab and the "
            "label, or name the columns in a first line (label TAB sentence)"
        )
    return texts, labels


class Classification:
    """The data of `--task sequence-classification`; `tasks.common` describes what every task has.

    Texts longer than `seq_len` tokens are cut at the end.

    Args:
      data: files of training examples.
      held_out: files of examples for validation. Empty: a part of `data` is held out.
      batch_size, seq_len, seed, multiple: see `Batches`, where `seq_len` is `longest`.

    Raises:
      FileNotFoundError: see `read_tsv`.
      ValueError: no training example has the label of a held-out one; or see `read_tsv` and `label_numbers`.
    """

    def __init__(
        self,
        data: Sequence[str],
        held_out: Sequence[str],
        tokenizer: OPTTokenizer,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        multiple: int = 1,
    ):
        texts, names = read_tsv(data)
        numbers = label_numbers(names)
        others, other_names = read_tsv(held_out) if held_out else ([], [])
        if not held_out:
            kept, out = hold_out(len(texts))
            others, other_names = [texts[i] for i in out], [names[i] for i in out]
            texts, names = [texts[i] for i in kept], [names[i] for i in kept]
        self.labels = list(numbers)
        if unknown := sorted(set(other_names) - set(numbers)):
            raise ValueError(f"{', '.join(held_out)}: no example in --data has the label {unknown[0]!r}: add one there")
        self.truncated = 0

        def batches(texts: list[str], names: list[str], seed: int | None) -> Batches:
            rows = tokenizer(texts, return_tensors=None).input_ids
            self.truncated += sum(len(row) > seq_len for row in rows)
            rows = [row[:seq_len] for row in rows]
            labels = np.array([numbers[name] for name in names])
            return Batches(rows, labels, batch_size, seq_len, tokenizer.pad_token_id, seed, multiple)

        self.training, self.held_out = batches(texts, names, seed), batches(others, other_names, None)
        self.tokens = int(self.training.lengths.sum())

    def summary(self) -> str:
        majority = np.bincount(self.held_out.labels).max() / len(self.held_out.labels)
        cut = f"; {self.truncated} longer texts are cut" if self.truncated else ""
        return (
            f"{len(self.training.examples)} texts to train on, {self.tokens:,} tokens, "
            f"labels {', '.join(self.labels)}; "
            f"{len(self.held_out.examples)} held out, {majority:.1%} of them with the same label{cut}"
        )

    def evaluate(self, predict: Callable) -> dict[str, float]:
        """{"val_loss", "val_accuracy"} on all held-out texts: the mean loss per text, and a share from 0 to 1.

        Args:
          predict: see `tasks.common.evaluate`.
        """
        loss, logits = evaluate(self.held_out, predict)
        right = np.argmax(np.stack(logits), axis=1) == self.held_out.labels
        return {"val_loss": loss, "val_accuracy": float(right.mean())}


def label_numbers(names: Sequence[str]) -> dict[str, int]:
    """Label -> number, from 0. Labels are in alphabetical order, or in numerical order if all are integers.

    Raises:
      ValueError: there is only one label.
    """
    try:
        labels = sorted(set(names), key=lambda name: (int(name), name))
    except ValueError:
        labels = sorted(set(names))
    if len(labels) < 2:
        raise ValueError(
            f"--data: all examples have the label {labels[0]!r}: there is nothing to tell apart; add others"
        )
    return {name: i for i, name in enumerate(labels)}


def label_config(paths: Sequence[str]) -> dict[str, Any]:
    """The entries `id2label` and `label2id` of a model's config.json, for the labels in the files.

    Raises:
      FileNotFoundError, ValueError: see `read_tsv` and `label_numbers`.
    """
    numbers = label_numbers(read_tsv(paths)[1])
    return {"id2label": {str(i): name for name, i in numbers.items()}, "label2id": numbers}
