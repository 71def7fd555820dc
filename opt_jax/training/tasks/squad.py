"""Extractive question answering: SQuAD's files (v1.1, v2.0), windows over long contexts, exact match and F1. No jax."""

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

STRIDE = 128  # tokens that neighbouring windows share, and below, as HF's example `run_qa.py` has them
N_BEST, LONGEST_ANSWER = 20, 30


@dataclasses.dataclass(frozen=True)
class Question:
    """answers: (text, where it begins in the context); none: the context does not have one (v2.0)."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a context behind its question. offsets: characters of each token in the context; None: not in it."""

    question: int
    ids: list[int]
    offsets: list[tuple[int, int] | None]
    answer: tuple[int, int]  # first and last token; (0, 0), where `</s>` is: not in this window


def read_squad(paths: Sequence[str]) -> list[Question]:
    """The questions of files in SQuAD's form: {"data": [{"paragraphs": [{"context", "qas": [...]}]}]}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, not of this form, or an answer that is not where it should be (the question is named).
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
    """`</s>` question `</s>` and so much of the context as fits into seq_len tokens, with a stride, for each question.

    Raises:
      ValueError: a question that leaves no room for its context.
    """
    backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: truncation is a state of it
    backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens  # which no copy has
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
    """The last token that begins at or before the answer, and the first that ends at or behind its end."""
    text, begin = answer
    end = begin + len(text)
    context = [(i, *offset) for i, offset in enumerate(offsets) if offset is not None]
    if not context or context[0][1] > begin or context[-1][2] < end:
        return 0, 0
    return max(i for i, first, _ in context if first <= begin), min(i for i, _, last in context if last >= end)


def best_answer(question: Question, windows: Sequence[tuple[Window, np.ndarray]], may_lack: bool) -> str:
    """The most likely span of all windows of a question (logits [T, 2] each).

    It is "" if the question may lack an answer and the span of `</s>` is more likely.
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
    """Words as SQuAD's evaluation compares them: lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, truth: str) -> float:
    return float(normalize(answer) == normalize(truth))


def f1(answer: str, truth: str) -> float:
    """Of the words, as often as they occur; without words on one side, 1 only if there are none on the other."""
    ours, theirs = normalize(answer), normalize(truth)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def scores(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1), means from 0 to 1, each question by the true answer that suits best."""
    matches, overlaps = [], []
    for question, answer in zip(questions, answers, strict=True):
        truths = [text for text, _ in question.answers if normalize(text)] or [""]
        matches.append(max(exact_match(answer, truth) for truth in truths))
        overlaps.append(max(f1(answer, truth) for truth in truths))
    return float(np.mean(matches)), float(np.mean(overlaps))


class QuestionAnswering:
    """What `--task question-answering` trains on; see `tasks` for what every task has."""

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
        """{"val_loss", "val_exact_match", "val_f1"} on all held-out questions."""
        loss, logits = evaluate(self.held_out, predict)
        windows_of: list[list] = [[] for _ in self.questions]
        for window, row in zip(self.windows, logits, strict=True):
            windows_of[window.question].append((window, row))
        pairs = zip(self.questions, windows_of, strict=True)
        answers = [best_answer(question, windows, self.may_lack) for question, windows in pairs]
        match, overlap = scores(self.questions, answers)
        return {"val_loss": loss, "val_exact_match": match, "val_f1": overlap}


def _hold_out(questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Numbers of the training questions and of those held out: all questions of a context are on the same side."""
    contexts = list(dict.fromkeys(question.context for question in questions))
    if len(contexts) < 2:
        raise ValueError("--data has only one context, none can be held out: name --validation-data")
    held_out = {contexts[i] for i in hold_out(len(contexts))[1]}
    sides = [question.context in held_out for question in questions]
    return [i for i, out in enumerate(sides) if not out], [i for i, out in enumerate(sides) if out]
