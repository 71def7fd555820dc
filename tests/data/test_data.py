"""The data pipeline: files, arrays of tokens, the order of batches for any number of readers, and its state."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from opt_jax import OPTTokenizer
from opt_jax.cli import main
from opt_jax.data import command, tokens
from opt_jax.data.corpus import Corpus
from opt_jax.data.documents import find_sources, pieces, read_documents
from opt_jax.data.files import find_files
from opt_jax.data.records import BadRecords
from opt_jax.data.tokenizers import train_tokenizer
from opt_jax.data.tokens import Tokens, open_tokens, tokenize, write_tokens
from opt_jax.data.windows import Reader, Windows
from opt_jax.data.workers import worker_processes


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("tiny")


def make_windows(path=None, **options):
    streams = [Tokens("a", np.arange(1001, dtype=np.int32)), Tokens("b", np.arange(2000, 2301, dtype=np.int32))]
    if path is not None:
        np.save(path, np.arange(1001, dtype=np.uint16))
        streams[0] = open_tokens(path)
    return Windows(streams, seq_len=10, batch_size=8, seed=5, **options)


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 7])
def test_batches_are_the_same_for_any_number_of_readers_and_after_a_resume(readers, first, tmp_path):
    windows = make_windows(tmp_path / "a.npy", weights=(0.7, 0.3))
    expected = [windows.rows(step) for step in range(20)]
    share = 8 // readers
    for host in range(readers):
        rows = np.arange(host * share, (host + 1) * share)
        with Reader(make_windows(tmp_path / "a.npy", weights=(0.7, 0.3)), rows, first, 20) as reader:
            steps = [place(slice(int(rows[0]), int(rows[-1]) + 1))["input_ids"] for place in reader]
        assert len(steps) == 20 - first
        for step, got in enumerate(steps, start=first):
            np.testing.assert_array_equal(got, expected[step][rows, :-1])


@pytest.mark.slow
def test_worker_processes_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "SharedMemory", None)  # Python warns at the end of some that Grain has opened
    windows = make_windows(tmp_path / "a.npy")
    with Reader(windows, range(8), 3, 9, workers=2) as reader:
        step = 0
        for step, place in enumerate(reader, start=3):
            labels = place(slice(2, 6))["labels"]
            np.testing.assert_array_equal(labels, windows.rows(step)[2:6, 1:])
            assert type(labels) is np.ndarray  # not an array in Grain's shared memory
    assert step == 8


def test_a_mixture_has_its_weights_and_repeats_what_is_short():
    windows = make_windows(weights=(1, 3))
    rows = np.concatenate([windows.rows(step) for step in range(50)])
    assert (rows[:, 0] >= 2000).sum() == 300 and len(rows) == 400
    assert (windows.starts(0) == np.where(windows.rows(0)[:, 0] >= 2000, windows.rows(0)[:, 0] - 999, 0)).any()


def test_segments_begin_at_each_separator():
    ids = np.array([5, 6, 2, 7, 8, 9, 2, 3, 3, 3, 3], np.int32)
    batch = Windows(ids, seq_len=10, batch_size=1, separator=2).batch(0)
    assert batch["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["labels"][0, 1] == 2  # the end of a document is predicted by its last token


def test_the_state_names_what_differs():
    windows = make_windows()
    state = json.loads(json.dumps(windows.state(4)))
    windows.check_state(state, 4)
    with pytest.raises(ValueError, match="checkpoint 4 was made with other data: seed was 6, is now 5"):
        windows.check_state(state | {"seed": 6}, 4)
    with pytest.raises(ValueError, match="step was 4, is now 5"):
        windows.check_state(state, 5)
    with pytest.raises(ValueError, match="no state of the data"):
        windows.check_state(None, 4)


def test_ids_beyond_the_vocabulary_are_an_error():
    with pytest.raises(ValueError, match="a: id 100 after token .*: it was made with another tokenizer"):
        Windows([Tokens("a", np.full(30, 100))], 10, 1, vocab_size=100).rows(0)


def test_bad_records_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": \n["x"]\n\xff\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff\nalso\r\n")
    (tmp_path / "c.txt").write_bytes(b"")
    bad = BadRecords(skip=True)
    assert read_documents(find_files([tmp_path / "*.*"]), bad) == ["one", "two", "fine\nalso\n"]
    assert bad.count == 5
    shown = capsys.readouterr().err
    assert all(
        f"left out: {tmp_path}/{w}" in shown for w in ("a.jsonl:2:", "a.jsonl:3", "a.jsonl:4", "b.txt:2", "c.txt:1")
    )
    with pytest.raises(ValueError, match=r"c\.txt:1: an empty file; --skip-bad-records"):
        read_documents([tmp_path / "c.txt"], BadRecords())
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        find_files([tmp_path / "*.zip"])


@pytest.mark.parametrize("block", [1, 40])
def test_text_is_cut_where_the_tokenizer_does_not_see_it(block, tmp_path, tokenizer):
    text = "def f(x):\n    return x\n\n\nclass A:\n\tpass\n  \n# end\nx = 1\n" * 50
    (tmp_path / "a.txt").write_text(text)
    cut = list(pieces([tmp_path / "a.txt"], BadRecords(), block))
    assert len(cut) > 20 and "".join(piece for piece, _ in cut) == text and [last for _, last in cut].count(True) == 1
    write_tokens([tmp_path / "a.txt"], tmp_path / "a.npy", tokenizer, "tiny")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), tokenize([text], tokenizer))
    assert words(cut, tokenizer) == words([(text, True)], tokenizer)


def words(cut, tokenizer):
    """The words of the pieces. A token never crosses the end of a word."""
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return [word for piece, _ in cut for word, _ in split(piece)]


def test_a_text_of_one_line_is_cut_between_words(tmp_path, tokenizer):
    text = "it's  one\tline - of 1 def f(x): and \N{SNOWMAN} two   spaces " * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    cut = list(pieces([tmp_path / "a.txt"], BadRecords(), block=1))
    assert max(len(piece) for piece, _ in cut) < 20 and "".join(piece for piece, _ in cut) == text
    assert [last for _, last in cut] == [False] * (len(cut) - 1) + [True]
    assert words(cut, tokenizer) == words([(text, True)], tokenizer)


def test_tokenize_command(tmp_path, capsys, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}\n" * 9}) + "\n" for i in range(40)))
    assert main(["tokenize", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "a.npy")]) == 0
    assert "of 40 documents as uint16" in capsys.readouterr().out
    assert main(["tokenize", str(tmp_path), "--output", str(tmp_path / "b.npy"), "--workers", "2"]) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    stream = open_tokens(tmp_path / "a.npy", tokenizer)
    np.testing.assert_array_equal(
        stream.read(0, len(stream)), tokenize(read_documents([tmp_path / "a.jsonl"]), tokenizer)
    )
    training, held_out = stream.split(0.05, 2)
    assert held_out.read(0, 1)[0] == 2 and training.read(len(training) - 1, 1)[0] == 2
    assert len(training) + len(held_out) == len(stream) + 1
    with pytest.raises(ValueError, match="made with another tokenizer"):
        open_tokens(tmp_path / "a.npy", train_tokenizer(["x"], 300))
    (tmp_path / "a.jsonl").write_text("[]\n")
    assert main(["tokenize", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "c.npy")]) == 1
    assert "a.jsonl:1: expected an object" in capsys.readouterr().err and not list(tmp_path.glob("c.npy*"))


@pytest.mark.parametrize("content", ['{"tokenizer": ', "[]", '{"tokenizer": {}}'])
def test_what_lies_beside_an_array_is_named_where_it_is_broken(tmp_path, tokenizer, content):
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "a.npy.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.npy\.json: not what opt-jax tokenize writes beside an array"):
        open_tokens(tmp_path / "a.npy", tokenizer)
    (tmp_path / "b.npy").write_bytes(b"no array at all")
    with pytest.raises(ValueError, match=r"b\.npy: not an array of token ids \(the magic string is not correct"):
        len(open_tokens(tmp_path / "b.npy", tokenizer))


def test_two_that_tokenise_to_one_name_do_not_mix_array_and_description(tmp_path, tokenizer, monkeypatch):
    """A second writer is refused between the renaming of the array and that of its description."""
    (tmp_path / "a.txt").write_text("text")
    array, real, refused = tmp_path / "a.npy", os.rename, []

    def rename(source, destination):
        real(source, destination)
        if destination == array and not refused:
            refused.append(True)
            with pytest.raises(FileExistsError, match="another process is writing this file now"):
                write_tokens([tmp_path / "a.txt"], array, tokenizer, "second")

    monkeypatch.setattr(os, "rename", rename)
    write_tokens([tmp_path / "a.txt"], array, tokenizer, "first")
    assert refused and json.loads(Path(f"{array}.json").read_text())["tokenizer"]["name"] == "first"
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "a.npy.json", "a.txt"]


def test_all_cores_tokenise_what_is_large(tmp_path, monkeypatch):
    asked = []

    def write(*_, workers, **__):
        asked.append(workers)
        return dict(tokens=1, documents=1, dtype="uint16", left_out=0)

    monkeypatch.setattr(command, "write_tokens", write)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"text" * 1024)
        file.truncate(200 << 20)
    (tmp_path / "b.txt").write_text("small")
    for name in "ab":
        command.tokenize_sources([str(tmp_path / f"{name}.txt")], tmp_path / "x.npy", "tiny", None, False)
    assert asked == [6, 1]


@pytest.mark.slow
def test_workers_do_not_finish_what_nobody_waits_for(monkeypatch):
    monkeypatch.setattr(tokens, "_TASK", 4)
    before = active_children()
    encoding: Any = tokens.encode(iter([("def f(x)", True)] * 20), OPTTokenizer.from_pretrained("tiny"), 2)
    next(encoding)
    workers = [worker for worker in active_children() if worker not in before]
    encoding.close()
    assert len(workers) == 2 and [worker.exitcode for worker in workers] == [-signal.SIGTERM] * 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="reads in /proc how much a process has written")
def test_a_worker_that_dies_while_it_writes_a_result_is_not_waited_for():
    def written(pid):
        return int(re.findall(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[0])

    with worker_processes(1, OPTTokenizer.from_pretrained("tiny")) as workers:
        pid = workers.submit(os.getpid).result()
        before, result = written(pid), workers.submit(bytes, 200 << 20)
        while written(pid) == before:  # the length of the result was written, not yet its bytes
            pass
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ValueError, match=r"has died \(out of memory"):
            result.result(timeout=60)


@pytest.fixture
def tokenising(tmp_path):
    """(process, terminal, ids of its workers) of `opt-jax tokenize`, whose standard error is a terminal."""
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 2_000_000)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "opt_jax.cli", "tokenize", str(tmp_path / "a.txt"), "--workers", "2"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "a.npy")], stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    shown = b""
    while not re.search(rb"[1-9][0-9.]*/4[0-9.]+ MB", shown):
        assert select.select([ours], [], [], 60)[0], shown
        shown += os.read(ours, 1 << 16)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    yield process, ours, workers
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    os.close(ours)


def ended(pid):
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_bar_on_a_terminal_and_nothing_left_of_what_is_ended(tokenising, sent, tmp_path):
    process, ours, workers = tokenising
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: all processes have closed the terminal
        while select.select([ours], [], [], 60)[0]:
            shown += os.read(ours, 1 << 16)
    assert process.wait(timeout=60) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sent, -signal.SIGKILL)
    for _ in range(100):  # a worker may end a moment after it has closed its files
        if all(map(ended, workers)):
            break
        time.sleep(0.1)
    assert all(map(ended, workers)) and not (tmp_path / "a.npy").exists()
    if sent == signal.SIGINT:
        assert b"opt-jax: interrupted" in shown
    if sent != signal.SIGKILL:
        assert b"Traceback" not in shown and b"Warning" not in shown and os.listdir(tmp_path) == ["a.txt"]


def test_hugging_face_dataset_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "set")
    assert read_documents(find_sources([f"hf:{tmp_path}/set"])) == ["one", "two"]
    assert read_documents(find_sources([f"hf:{tmp_path}/set:test"])) == ["two"]
    with pytest.raises(ValueError, match="no split 'dev', but train, test"):
        find_sources([f"hf:{tmp_path}/set:dev"])


def test_corpus_of_arrays_and_text_with_validation_data(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.arange(400) % 50 + 3)
    (tmp_path / "valid.txt").write_text("held out")
    corpus = Corpus([str(tmp_path / "a.npy")], [str(tmp_path / "valid.txt")])
    (training,), (valid,) = corpus.tokens(tokenizer)
    assert len(training) == 400 and tokenizer.decode(valid.read(0, len(valid))) == "</s>held out</s>"
    np.save(tmp_path / "b.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="not integers in one dimension"):
        Corpus([str(tmp_path / "b.npy")]).tokens(tokenizer)


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.uint32])
def test_ids_of_an_array_that_are_no_int32(dtype, tmp_path):
    """Cast to int32, they would become ids that the vocabulary has."""
    ids = np.arange(50).astype(dtype)
    ids[37] = 2**32 - 5 if dtype == np.uint32 else 2**32 + 5
    np.save(tmp_path / "a.npy", ids)
    stream = open_tokens(tmp_path / "a.npy")
    assert stream.read(0, 37).tolist() == list(range(37))
    with pytest.raises(ValueError, match=f"a.npy from token 30 holds {ids[37]}, outside"):
        stream.read(30, 10)
    for name, array in (("", ids), ("floats", np.arange(50.0))):
        with pytest.raises(ValueError, match="from token 0 (holds 42949|must be integers, not float64)"):
            Tokens(name, array).read(0, 50)


def test_a_vocabulary_with_holes_is_written_as_it_is(tmp_path):
    """Six tokens, but their ids do not fit into uint16."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(BPE({name: i for i, name in enumerate(names)} | {"a": 70000, "b": 70001}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    (tmp_path / "a.txt").write_text("ab")
    about = write_tokens([tmp_path / "a.txt"], tmp_path / "a.npy", OPTTokenizer(backend), "holes")
    assert about["dtype"] == "int32" and np.load(tmp_path / "a.npy").tolist() == [2, 70000, 70001, 2]


@pytest.mark.slow
def test_real_text_and_tokenizer(shared_data, tmp_path):
    tokenizer = OPTTokenizer.from_pretrained(shared_data / "opt-tokenizer")
    files = [shared_data / "wikitext-2" / "valid.txt", shared_data / "tinyshakespeare.txt"]
    about = write_tokens(files, tmp_path / "a.npy", tokenizer, "opt")
    assert about["documents"] == 2 and about["dtype"] == "uint16"
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), tokenize(read_documents(files), tokenizer))
