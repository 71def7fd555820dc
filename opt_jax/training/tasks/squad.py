"""The task of extractive question answering: SQuAD's files (v1.1, v2.0), windows over long contexts, exact match, F1.

Does not use JAX.
"""

import codecs
import collections
import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opt_jax.system.reading import json_object, read_small
from opt_jax.text.tokenizer import OPTTokenizer
from opt_jax.text.tokenizer_files import panics_as_errors
from opt_jax.training.tasks.common import LARGEST_FILE, Batches, evaluate, hold_out, named_files

# As in HF's example `run_qa.py`: the tokens that neighbouring windows share, the number of candidates for the start and
# for the end of an answer, and the largest number of tokens in an answer.
STRIDE, N_BEST, LONGEST_ANSWER = 128, 20, 30


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a context. `answers` are pairs (text, index of its first character); v2.0 has some without."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """A question and the part of its context that fits behind it."""

    question: int  # its number
    ids: list[int]
    offsets: list[tuple[int, int] | None]  # the characters of the context that each token covers; None: not a context's
    answer: tuple[int, int]  # the first and the last token; (0, 0), which is `</s>`, if it is not in this window


def read_squad(paths: Sequence[str]) -> list[Question]:
    """The questions in files of SQuAD's form: {"data": [{"paragraphs": [{"context", "qas": [...]}]}]}.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is not JSON of this form, or an answer is not where it should be (the question is named).
    """
    questions = []
    for path in named_files(paths):
        text = read_small(path, LARGEST_FILE)
        content = json_object(text.removeprefix(codecs.BOM_UTF8), path)
        try:
            for article in content["data"]:
                for paragraph in article["paragraphs"]:
                    questions += [_question(path, paragraph["context"], qa) for qa in paragraph["qas"]]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else "a value is of another type"
            raise ValueError(f"{path}: not in the form of SQuAD ({what})") from None
    if not questions:
        raise ValueError(f"{', '.join(paths)}: no questions")
    return questions


def _question(path: Path, context: str, qa: dict[str, Any]) -> Question:
    answers = () if qa.get("is_impossible") else tuple((a["text"], a["answer_start"]) for a in qa["answers"])
    if not answers and not qa.get("is_impossible"):
        raise ValueError(f"{path}: question {qa.get('id')!r} has no answer, and is not marked is_impossible")
    for text, start in answers:
        if not text or context[start : start + len(text)] != text:
            raise ValueError(f"{path}: question {qa.get('id')!r}: its answer {text!r} is not at character {start}")
    return Question(qa["question"].lstrip(), context, answers)


@panics_as_errors()
def windows(questions: Sequence[Question], tokenizer: OPTTokenizer, seq_len: int) -> list[Window]:
    """The windows of each question: `</s>` question `</s>`, and a part of the context, together at most seq_len tokens.

    Neighbouring windows share `STRIDE` tokens, or fewer if there is not enough room.

    Raises:
      ValueError: a question leaves no room for its context.
    """
    backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, because truncation changes it
    backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens  # which a copy lacks
    lengths = [len(e.ids) for e in backend.encode_batch([(q.question, "") for q in questions])]
    stride = min(STRIDE, (seq_len - max(lengths)) // 2)
    if stride < 1:
        worst = questions[int(np.argmax(lengths))].question
        raise ValueError(f"--seq-len {seq_len} leaves no room for a context behind the question {worst[:60]!r}")
    backend.enable_truncation(seq_len, stride=stride, strategy="only_second")
    windows = []
    for number, question in enumerate(questions):
        first = backend.encode(question.question, question.context)
        for encoding in (first, *first.overflowing):
            pairs = zip(encoding.offsets, encoding.sequence_ids, strict=True)
            offsets = [tuple(offset) if sequence == 1 else None for offset, sequence in pairs]
            answer = _answer_tokens(offsets, question.answers[0]) if question.answers else (0, 0)
            windows.append(Window(number, encoding.ids, offsets, answer))
    return windows


def _answer_tokens(offsets: list[tuple[int, int] | None], answer: tuple[str, int]) -> tuple[int, int]:
    """The first and the last token of the answer; (0, 0) if the window does not contain all of it.

    The first is the last token that begins at or before the answer. The last is the first one that ends at or after
    its end.
    """
    text, begin = answer
    end = begin + len(text)
    context = [(i, *offset) for i, offset in enumerate(offsets) if offset is not None]
    if not context or context[0][1] > begin or context[-1][2] < end:
        return 0, 0
    return max(i for i, first, _ in context if first <= begin), min(i for i, _, last in context if last >= end)


def best_answer(question: Question, windows: Sequence[tuple[Window, np.ndarray]], may_lack: bool) -> str:
    """The text of the most likely span in the windows of a question, as in HF's `run_qa.py`.

    Args:
      windows: its windows, and their logits [T, 2] for the start and the end.
      may_lack: return "" if the span of `</s>` is more likely.
    """
    best, text = -np.inf, ""
    for window, logits in windows:
        starts, ends = (np.argsort(-logits[: len(window.ids), i], kind="stable")[:N_BEST] for i in (0, 1))
        for start in starts:
            for end in ends:
                first, last = window.offsets[start], window.offsets[end]
                if first is None or last is None or not 0 <= end - start < LONGEST_ANSWER:
                    continue
                if (score := logits[start, 0] + logits[end, 1]) > best:
                    best, text = score, question.context[first[0] : last[1]]
    no_answer = min(logits[0].sum() for _, logits in windows)
    return "" if may_lack and no_answer > best else text


def normalize(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation compares them: in lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, truth: str) -> float:
    """1 if the normalized words are equal, else 0. Source: SQuAD's evaluation script."""
    return float(normalize(answer) == normalize(truth))


def f1(answer: str, truth: str) -> float:
    """The F1 score, from 0 to 1, of the normalized words, with repetitions. Source: SQuAD's evaluation script.

    If one side has no words, it is 1 if the other has none either, else 0.
    """
    answer_words, true_words = normalize(answer), normalize(truth)
    if not answer_words or not true_words:
        return float(answer_words == true_words)
    common = (collections.Counter(answer_words) & collections.Counter(true_words)).total()
    return 2 * common / (len(answer_words) + len(true_words))


def scores(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, float]:
    """The means of exact match and F1, from 0 to 1. Each question counts with the true answer that gives the most."""
    matches, overlaps = [], []
    for question, answer in zip(questions, answers, strict=True):
        truths = [text for text, _ in question.answers if normalize(text)] or [""]
        matches.append(max(exact_match(answer, truth) for truth in truths))
        overlaps.append(max(f1(answer, truth) for truth in truths))
    return float(np.mean(matches)), float(np.mean(overlaps))


class QuestionAnswering:
    """The data of `--task question-answering`; `tasks.common` describes what every task has.

    Args:
      data: SQuAD's files to train on.
      held_out: files for validation. Empty: the questions about a part of the contexts in `data` are held out.
      batch_size, seq_len, seed, multiple: see `Batches`, where `seq_len` is `longest`.

    Raises:
      FileNotFoundError, ValueError: see `read_squad` and `windows`; or nothing can be held out.
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
        questions = read_squad(data)
        if held_out:
            self.questions = read_squad(held_out)
        else:
            kept, out = _hold_out(questions)
            questions, self.questions = [questions[i] for i in kept], [questions[i] for i in out]
        self.may_lack = any(not question.answers for question in questions)
        training, self.windows = (windows(part, tokenizer, seq_len) for part in (questions, self.questions))

        def batches(part: list[Window], seed: int | None) -> Batches:
            labels, pad = np.array([window.answer for window in part]), tokenizer.pad_token_id
            return Batches([w.ids for w in part], labels, batch_size, seq_len, pad, seed, multiple)

        self.training, self.held_out = batches(training, seed), batches(self.windows, None)
        self.tokens = int(self.training.lengths.sum())
        self._count = len(questions)

    def summary(self) -> str:
        return (
            f"{self._count} questions to train on in {len(self.training.examples)} windows, {self.tokens:,} tokens; "
            f"{len(self.questions)} held out in {len(self.windows)} windows"
        )

    def evaluate(self, predict: Callable) -> dict[str, float]:
        """{"val_loss", "val_exact_match", "val_f1"} on all held-out questions. The last two are from 0 to 1.

        Args:
          predict: see `tasks.common.evaluate`.
        """
        loss, logits = evaluate(self.held_out, predict)
        windows_of: list[list] = [[] for _ in self.questions]
        for window, row in zip(self.windows, logits, strict=True):
            windows_of[window.question].append((window, row))
        pairs = zip(self.questions, windows_of, strict=True)
        answers = [best_answer(question, windows, self.may_lack) for question, windows in pairs]
        match, overlap = scores(self.questions, answers)
        return {"val_loss": loss, "val_exact_match": match, "val_f1": overlap}


def _hold_out(questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    """The numbers of the training questions and of the held-out ones. No context has questions among both."""
    contexts = list(dict.fromkeys(question.context for question in questions))
    if len(contexts) < 2:
        raise ValueError("--data has only one context, so none can be held out: name --validation-data")
    held_out = {contexts[i] for i in hold_out(len(contexts))[1]}
    sides = [question.context in held_out for question in questions]
    return [i for i, out in enumerate(sides) if not out], [i for i, out in enumerate(sides) if out]
