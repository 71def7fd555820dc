"""Calibration and evaluation texts are those of the papers' code, token for token."""

import json
import random

import numpy as np
import pytest
from conftest import REPOSITORY

from opt_jax import OPTForCausalLM, OPTTokenizer
from opt_jax.cli import main
from opt_jax.compression.calibration import read_calibration
from opt_jax.data.protocols import evaluation_ids
from opt_jax.evaluation._perplexity import perplexity
from opt_jax.evaluation.command import read_ids

# As in WikiText-2: blank rows, and line breaks at the ends of others.
ROWS = ["", " = A title = \n", "", *(REPOSITORY / "CONTRIBUTING.md").read_text().splitlines(keepends=True)[:60], ""]
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("tiny")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return [str(path)]


def gptq_windows(ids, samples, seqlen, seed):
    """`get_wikitext2` and `get_ptb` of GPTQ's datautils.py, after tokenising."""
    random.seed(seed)
    windows = []
    for _ in range(samples):
        i = random.randint(0, ids.shape[1] - seqlen - 1)
        j = i + seqlen
        windows.append(ids[:, i:j])
    return np.concatenate(windows)


def gptq_c4(rows, tokenizer, samples, seqlen, seed):
    """`get_c4` of it, for training windows and for those to measure."""
    random.seed(seed)
    windows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(rows) - 1)
            ids = tokenizer(rows[i], return_tensors="np").input_ids
            if ids.shape[1] > seqlen:
                break
        i = random.randint(0, ids.shape[1] - seqlen - 1)
        j = i + seqlen
        windows.append(ids[:, i:j])
    return np.concatenate(windows)


@pytest.mark.parametrize(("rows", "separator"), [("blank-lines", "\n\n"), ("spaces", " ")])
def test_joined_rows(data, tokenizer, rows, separator):
    ids = tokenizer(separator.join(ROWS), return_tensors="np").input_ids
    samples = read_calibration(data, tokenizer, samples=5, window=LENGTH, seed=3, rows=rows)
    assert (samples.ids == gptq_windows(ids, 5, LENGTH, 3)).all() and samples.ids.dtype == np.int32
    assert ids[0, 0] == tokenizer.bos_token_id and (ids[0, 1:] != tokenizer.bos_token_id).all()
    assert evaluation_ids(ROWS, rows, tokenizer, LENGTH).tolist() == ids[0].tolist()
    other = read_calibration(data, tokenizer, samples=5, window=LENGTH, seed=4, rows=rows)
    assert other.about["hash"] != samples.about["hash"] and other.about | {"hash": 0, "seed": 0} == {
        "data": data,
        "text_key": "text",
        "rows": rows,
        "samples": 5,
        "window": LENGTH,
        "seed": 0,
        "hash": 0,
    }


def test_random_rows(data, tokenizer):
    for rows in ("c4", None):
        samples = read_calibration(data, tokenizer, samples=9, window=LENGTH, seed=2, rows=rows)
        assert (samples.ids == gptq_c4(ROWS, tokenizer, 9, LENGTH, 2)).all() and samples.about["rows"] == "c4"
    expected = gptq_c4(ROWS, tokenizer, 256, LENGTH, 0).reshape(-1)
    assert evaluation_ids(ROWS, "c4", tokenizer, LENGTH).tolist() == expected.tolist()


def test_the_newer_c4(tokenizer):
    rows = [f"row {i}" for i in range(1200)]
    ids = tokenizer(" ".join(rows[:1100]), return_tensors="np").input_ids[0]
    assert evaluation_ids(rows, "c4-new", tokenizer, 4).tolist() == ids[: 256 * 4].tolist()
    assert evaluation_ids(rows, "c4-new", tokenizer, 2048).tolist() == ids.tolist()


def test_a_text_file_is_the_joined_text_already(tmp_path, tokenizer):
    (tmp_path / "wiki.txt").write_text("\n\n".join(ROWS), newline="")
    ids = tokenizer("\n\n".join(ROWS), return_tensors="np").input_ids
    for rows in (None, "blank-lines", "spaces"):
        samples = read_calibration([str(tmp_path / "wiki.txt")], tokenizer, samples=4, window=LENGTH, rows=rows)
        assert (samples.ids == gptq_windows(ids, 4, LENGTH, 0)).all()
    for rows in ("documents", "blank-lines", "spaces"):
        read, count = read_ids([str(tmp_path / "wiki.txt")], tokenizer, rows=rows)
        assert read.tolist() == ids[0].tolist() and count == 1


def test_what_is_refused(data, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="--calibration .*rows.jsonl: none of 64 rows has more than 400 tokens"):
        read_calibration(data, tokenizer, window=400)
    with pytest.raises(ValueError, match="tokens: a window of 20000 needs a text of more"):
        read_calibration(data, tokenizer, window=20000, rows="spaces")
    (tmp_path / "short.txt").write_text("one two three four")
    with pytest.raises(ValueError, match=r"short.txt: only \d of 128 windows differ: give more text, or fewer samples"):
        read_calibration([str(tmp_path / "short.txt")], tokenizer, window=4)
    np.save(tmp_path / "ids.npy", np.arange(9))
    with pytest.raises(ValueError, match=r"--calibration .*ids.npy: holds token ids"):
        read_calibration([str(tmp_path / "ids.npy")], tokenizer)


def test_evaluation_by_rows(data, tokenizer, capsys):
    model = OPTForCausalLM.from_pretrained("tiny")
    for rows in ("spaces", "c4", "c4-new"):
        options = ["--rows", rows, "--window", str(LENGTH), "--protocol", "non-overlapping", "--json"]
        assert main(["eval", "tiny", "--data", *data, *options, "--batch-size", "64"]) == 0
        report = json.loads(capsys.readouterr().out)
        expected = perplexity(model, evaluation_ids(ROWS, rows, tokenizer, LENGTH), window=LENGTH, batch_size=64)
        assert report["results"][0]["perplexity"] == expected.perplexity and report["documents"] == len(ROWS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "c4", "--window", "8"], "--rows c4 needs --protocol non-overlapping"),
        (
            ["--rows", "c4-new", "--protocol", "sliding"],
            "--rows c4-new needs --window, the tokens of its windows: 2048 in the papers",
        ),
    ],
)
def test_evaluation_options_that_do_not_fit(data, capsys, words, message):
    assert main(["eval", "tiny", "--data", *data, *words]) == 1
    assert message in capsys.readouterr().err
