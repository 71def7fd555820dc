"""`opt-jax tokenize` into a directory of several arrays: the same ids as one array, however it was written and read."""

import contextlib
import errno
import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from opt_jax import OPTTokenizer
from opt_jax.cli import main
from opt_jax.data import arrays, shards
from opt_jax.data.arrays import INDEX
from opt_jax.data.corpus import Corpus
from opt_jax.data.documents import find_sources
from opt_jax.data.shards import write_arrays
from opt_jax.data.tokenizers import train_tokenizer
from opt_jax.data.tokens import Tokens, open_tokens, write_tokens
from opt_jax.data.windows import Windows
from opt_jax.system.temporary import TemporaryPlace


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("tiny")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A directory of five inputs, of which each but the last two becomes an array; one has no text at all."""
    monkeypatch.setattr(shards, "_INPUT", 100)
    directory = tmp_path / "texts"
    directory.mkdir()
    (directory / "a.txt").write_text("def f(x):\n    return x\n" * 9)
    records = [json.dumps({"text": f"document {i}", "other": "x"}) + "\n" for i in range(20)]
    (directory / "b.jsonl").write_text("".join(records))
    (directory / "c.jsonl").write_text('{"text": " "}\n{"text": ""}\n' * 9)
    (directory / "d.txt.gz").write_bytes(gzip.compress(b"last but one\n"))
    (directory / "e.txt").write_text("last\n")
    return directory


def write(texts, output, tokenizer, **options):
    return write_arrays(find_sources([texts]), output, tokenizer, "tiny", **options)


def stream(path):
    tokens = open_tokens(path)
    return tokens.read(0, len(tokens))


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def end_after(number):
    """A `progress` that raises KeyboardInterrupt where the given number of arrays (0, 1 or 3) is finished."""
    calls, most = [], {0: 1, 1: 2, 3: 3}[number]  # first that of the arrays that were there; that without text has none

    def progress(characters):
        calls.append(characters)
        if len(calls) > most:
            raise KeyboardInterrupt

    return progress


def test_the_ids_are_those_of_one_array_for_any_number_of_workers(texts, tmp_path, tokenizer, capsys):
    write_tokens(find_sources([texts]), tmp_path / "one.npy", tokenizer, "tiny")
    expected = np.load(tmp_path / "one.npy")
    names = ["tokenize", str(texts), "--output"]
    assert main([*names, str(tmp_path / "many")]) == 0
    assert "tokens of 23 documents as uint16 in 4 arrays, in " in capsys.readouterr().out
    assert main([*names, str(tmp_path / "new" / "two"), "--workers", "2"]) == 0
    assert content(tmp_path / "many") == content(tmp_path / "new" / "two")
    parts = [np.load(tmp_path / "many" / f"opt-jax-0000{i}.npy") for i in range(4)]
    assert [len(part) > 0 for part in parts] == [True, True, False, True]
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    np.testing.assert_array_equal(stream(tmp_path / "many" / INDEX), expected)
    assert os.listdir(tmp_path / "new") == ["two"]
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["tokens"] == len(expected) and index["documents"] == 23 and index["text_key"] == "text"
    sources = [[Path(source["name"]).name for source in entry["sources"]] for entry in index["arrays"]]
    assert sources == [["a.txt"], ["b.jsonl"], ["c.jsonl"], ["d.txt.gz", "e.txt"]]


def test_a_run_reads_them_as_one_array(texts, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(arrays, "_OPEN", 1)
    write_tokens(find_sources([texts]), tmp_path / "one.npy", tokenizer, "tiny")
    write(texts, tmp_path / "many", tokenizer)
    named = ([str(tmp_path / "one.npy")], [str(tmp_path / "many")], [str(tmp_path / "many" / INDEX)])
    shutil.copytree(tmp_path / "many", tmp_path / "above" / "many")
    named = (*named, [str(tmp_path / "above")])
    runs = []
    for names in named:
        (training,), (held_out,) = Corpus(names).tokens(tokenizer)
        training = pickle.loads(pickle.dumps(training))
        windows = Windows([training], seq_len=7, batch_size=4, seed=1)
        rows = [windows.rows(step) for step in range(windows.count // 4)]
        runs.append((windows.description(), held_out.hash_of_ids(), np.stack(rows)))
    for description, held_out, rows in runs[1:]:
        assert (description, held_out) == runs[0][:2]
        np.testing.assert_array_equal(rows, runs[0][2])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        Corpus([str(tmp_path / "many")]).tokens(train_tokenizer(["x"], 300))
    Corpus([str(tmp_path / "many"), str(tmp_path / "one.npy")], mixed=True).tokens(tokenizer)


def test_any_slice(tmp_path, texts, tokenizer):
    write(texts, tmp_path / "many", tokenizer)
    tokens = Tokens("", path=tmp_path / "many" / INDEX)
    expected = stream(tmp_path / "many" / INDEX)
    for start in range(len(expected) + 3):
        for length in (0, 1, 50, 400):
            np.testing.assert_array_equal(tokens.read(start, length), expected[start : start + length])


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_the_same_command_goes_on(finished, texts, tmp_path, tokenizer, capsys, monkeypatch):
    write(texts, tmp_path / "whole", tokenizer)
    with pytest.raises(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer, progress=end_after(finished))
    place = tmp_path / ".many.new"
    assert not (tmp_path / "many").exists() and not list(place.rglob("*.part"))
    if not finished:
        assert not place.exists()
    else:
        assert f"{finished} of 4 arrays are finished: the same command goes on" in capsys.readouterr().err
        for names in ([str(place / "new")], [str(place / "new" / "opt-jax-00000.npy")]):
            with pytest.raises(
                ValueError, match="opt-jax tokenize has not finished, or the directory was copied in part"
            ):
                Corpus(names)
    real, written = shards._write_array, []
    monkeypatch.setattr(shards, "_write_array", lambda shard, *rest: written.append(shard.number) or real(shard, *rest))
    (tmp_path / "many").mkdir()  # an empty directory may be there
    write(texts, tmp_path / "many", tokenizer)
    assert written == list(range(finished, 4))
    assert content(tmp_path / "many") == content(tmp_path / "whole") and not place.exists()
    write(texts, tmp_path / "many", tokenizer)  # once more: it is complete
    assert written == list(range(finished, 4))


def test_killed_before_the_directory_gets_its_name(texts, tmp_path, tokenizer, monkeypatch):
    write(texts, tmp_path / "whole", tokenizer)
    real = os.rename

    def rename(source, destination):
        if destination == tmp_path / "many":
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer)
    monkeypatch.setattr(os, "rename", real)
    monkeypatch.setattr(shards, "_write_array", None)
    write(texts, tmp_path / "many", tokenizer)
    assert content(tmp_path / "many") == content(tmp_path / "whole") and not (tmp_path / ".many.new").exists()


def test_a_finished_array_that_was_damaged_is_written_again(texts, tmp_path, tokenizer):
    write(texts, tmp_path / "whole", tokenizer)
    with pytest.raises(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer, progress=end_after(3))
    (tmp_path / ".many.new" / "new" / "opt-jax-00000.npy").write_bytes(b"damaged")
    (tmp_path / ".many.new" / "new" / "opt-jax-00001.npy").unlink()
    write(texts, tmp_path / "many", tokenizer)
    assert content(tmp_path / "many") == content(tmp_path / "whole")


def changed_file(texts):
    os.utime(texts / "a.txt", ns=(1, 1))


def removed_file(texts):
    (texts / "a.txt").unlink()


def file_before(texts):
    (texts / "0.txt").write_text("x" * 200)


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (changed_file, {}, r"a\.txt has changed"),
        (removed_file, {}, r"a\.txt was an input, and is none now"),
        (file_before, {}, r"there are other inputs beside .*a\.txt, or in another order"),
        (None, {"text_key": "other"}, "--text-key was text"),
        (None, {"tokenizer": None}, "--tokenizer tiny has changed"),
    ],
)
def test_other_inputs_and_options_are_named(complete, change, options, message, texts, tmp_path, tokenizer):
    with contextlib.suppress(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer, **({} if complete else {"progress": end_after(1)}))
    assert complete == (tmp_path / "many").exists()
    if change is not None:
        change(texts)
    kept = content(tmp_path / "many") if complete else content(tmp_path / ".many.new" / "new")
    options = {"tokenizer": tokenizer} | options
    other = options.pop("tokenizer") or train_tokenizer(["x"], 300)
    remedy = "choose another name, or remove it" if complete else "start the same command as then, or remove it"
    with pytest.raises(ValueError, match=f"with other options: .*{message}; {remedy}"):
        write(texts, tmp_path / "many", other, **options)
    assert kept == (content(tmp_path / "many") if complete else content(tmp_path / ".many.new" / "new"))


def test_other_inputs_that_no_finished_array_has(texts, tmp_path, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer, progress=end_after(1))
    (texts / "b.jsonl").write_text('{"text": "corrected"}\n')
    (texts / "f.txt").write_text("new" * 99)
    write(texts, tmp_path / "many", tokenizer)
    write(texts, tmp_path / "whole", tokenizer)
    assert content(tmp_path / "many") == content(tmp_path / "whole")
    (texts / "g.txt").write_text("new" * 99)
    with pytest.raises(ValueError, match=r"g\.txt is a new input"):
        write(texts, tmp_path / "many", tokenizer)


def test_many_small_files_are_grouped_in_linear_time(monkeypatch):
    monkeypatch.setattr(shards, "_state", lambda source: {"name": str(source), "size": 5})
    begin = time.process_time()
    groups = shards.shards_of([Path(f"{i}.txt") for i in range(20_000)])
    assert len(groups) == 1 and len(groups[0].sources) == 20_000
    assert time.process_time() - begin < 2  # 6 s if it is quadratic; a corpus may have millions


def test_more_files_than_an_index_may_name(texts, tmp_path, tokenizer, monkeypatch):
    write(texts, tmp_path / "many", tokenizer)
    size = (tmp_path / "many" / INDEX).stat().st_size
    monkeypatch.setattr(shards, "SMALL_FILE", size - 1)  # the most that is read
    with pytest.raises(ValueError, match="5 files are too many for an index of 0 MiB: write their texts into fewer"):
        write(texts, tmp_path / "other", tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["many", "texts"]


def test_other_inputs_do_not_remove_finished_arrays(texts, tmp_path, tokenizer, capsys):
    with pytest.raises(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer, progress=end_after(3))
    (tmp_path / ".many.new" / "new" / "opt-jax-00000.json").unlink()  # with several processes, the largest are first
    kept = content(tmp_path / ".many.new" / "new")
    capsys.readouterr()
    with pytest.raises(ValueError, match="was an input, and is none now"):
        write(texts / "a.txt", tmp_path / "many", tokenizer)
    assert kept == content(tmp_path / ".many.new" / "new")
    assert "goes on" not in capsys.readouterr().err


def test_what_a_killed_process_left_of_inputs_that_are_gone(texts, tmp_path, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        write(texts, tmp_path / "many", tokenizer, progress=end_after(1))
    for left in ("opt-jax-00003.npy", f"opt-jax-00003.npy.opt-jax-{'0' * 32}.part"):
        (tmp_path / ".many.new" / "new" / left).write_bytes(b"killed before it had its entry")
    for name in ("d.txt.gz", "e.txt"):
        (texts / name).unlink()
    write(texts, tmp_path / "many", tokenizer)
    write(texts, tmp_path / "whole", tokenizer)
    assert content(tmp_path / "many") == content(tmp_path / "whole")


def test_bad_records_are_reported_counted_and_part_of_the_options(texts, tmp_path, tokenizer, capsys):
    for name in ("a.jsonl", "f.jsonl"):
        (texts / name).write_text('{"text": "fine"}\n' * 15 + "bad\n" * 15)
    names = ["tokenize", str(texts), "--workers", "2", "--output", str(tmp_path / "many")]
    assert main(names) == 1
    assert "jsonl:16: not JSON" in capsys.readouterr().err
    assert main([*names, "--skip-bad-records"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("jsonl:") == 20 and shown.err.count("further ones are counted only") == 1
    assert ", 30 bad records left out, in " in shown.out
    assert main(names) == 1
    assert "--skip-bad-records left out 30 records; choose another name" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read(texts, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"a\.txt has changed while it was read"):
        write(texts, tmp_path / "many", tokenizer, progress=lambda _: changed_file(texts))
    assert sorted(os.listdir(tmp_path)) == ["texts"]


def missing(directory):
    (directory / "opt-jax-00001.npy").unlink()


def short(directory):
    os.truncate(directory / "opt-jax-00001.npy", 200)


def of_another_length(directory):
    np.save(directory / "opt-jax-00001.npy", np.ones(5, np.uint16))


def of_zeros(directory):
    array = np.load(directory / "opt-jax-00001.npy")
    np.save(directory / "opt-jax-00001.npy", np.where(np.arange(len(array)) > len(array) // 2, 0, array))


def exchanged(directory):
    index = json.loads((directory / INDEX).read_text())
    index["arrays"][0]["tokens"] += 1
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, rf"opt-jax-00001\.npy is missing, which {INDEX} names"),
        (short, r"opt-jax-00001\.npy: not an array of token ids"),
        (of_another_length, rf"opt-jax-00001\.npy holds 5 ids of uint16, not the \d+ of uint16 that {INDEX} says"),
        (of_zeros, rf"opt-jax-00001\.npy is not the array that {INDEX} describes"),
        (exchanged, rf"{INDEX}: not an index that opt-jax tokenize writes \(a field has another type or value\)"),
    ],
)
def test_a_damaged_directory_is_one_line(damage, message, texts, tmp_path, tokenizer):
    write(texts, tmp_path / "many", tokenizer)
    damage(tmp_path / "many")
    with pytest.raises(ValueError, match=message) as error:
        Corpus([str(tmp_path / "many")]).tokens(tokenizer)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        write(texts, tmp_path / "many", tokenizer)


def test_the_same_text_twice_is_a_warning(texts, tmp_path, tokenizer, capsys):
    write(texts, texts / "many", tokenizer)
    write_tokens(find_sources([texts / "a.txt"]), tmp_path / "a.npy", tokenizer, "tiny")
    capsys.readouterr()
    cases = {
        (texts,): "a.txt is read twice, also in",
        (texts / "many", tmp_path / "a.npy"): "a.txt is read twice, also in .*a.npy",
        (texts / "many", None, texts / "e.txt"): "e.txt is in --data and in --validation-data",
        (texts, None, texts / "a.txt"): "a.txt is in --data and in --validation-data",
        (tmp_path / "a.npy", None, tmp_path / "a.npy"): "a.npy is in --data and in --validation-data, and 1 more",
        (tmp_path / "a.npy", texts / "e.txt"): "",
        (texts / "a.txt", texts / "a.txt"): "",  # on purpose
        (tmp_path / "a.npy", texts / "b.jsonl", None, texts / "e.txt"): "",
    }
    for names, message in cases.items():
        split = names.index(None) if None in names else len(names)
        training, held_out = ([str(name) for name in part] for part in (names[:split], names[split + 1 :]))
        Corpus(training, held_out)
        shown = capsys.readouterr().err
        assert re.search(f"warning: .*{message}", shown) if message else "warning" not in shown, names


def test_one_of_several_arrays_is_no_data(texts, tmp_path, tokenizer):
    write(texts, tmp_path / "many", tokenizer)
    with pytest.raises(ValueError, match=r"one of several arrays: name their directory, .*many"):
        Corpus([str(tmp_path / "many" / "*.npy")])
    shutil.copytree(tmp_path / "many", tmp_path / "copy")
    (tmp_path / "copy" / INDEX).unlink()
    with pytest.raises(ValueError, match="00000.npy is one of several arrays, but .* is not beside it"):
        Corpus([str(tmp_path / "copy")])


def test_names_that_are_not_written_to(texts, tmp_path, tokenizer, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, message in {
        "full": "full is there already, and holds file, but no",
        "full/file": "file is there already, and holds file, but no",
        "link": "is a symbolic link",
        "x.npz": "must end in .npy, or be a directory",
    }.items():
        assert main(["tokenize", str(texts), "--output", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    assert main(["tokenize", str(texts), "--output", "gs://bucket/many"]) == 1
    assert "gs://bucket/many: this can only be written to a disk" in capsys.readouterr().err
    with TemporaryPlace(tmp_path / ".many.new", "new").locked(), pytest.raises(FileExistsError, match="is in use"):
        write(texts, tmp_path / "many", tokenizer)


def test_a_full_disk_is_one_line(texts, tmp_path, tokenizer, monkeypatch):
    def write_array(*arguments):
        if len(os.listdir(tmp_path / ".many.new" / "new")) > 4:  # two arrays, and the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    real = shards.write_array
    monkeypatch.setattr(shards, "write_array", write_array)
    with pytest.raises(OSError, match=r"No space left on device .*make room there.*opt-jax-00002\.npy"):
        write(texts, tmp_path / "many", tokenizer)
    names = ["opt-jax-00000.json", "opt-jax-00000.npy", "opt-jax-00001.json", "opt-jax-00001.npy"]
    assert sorted(os.listdir(tmp_path / ".many.new" / "new")) == names


def test_rows_of_a_dataset_are_not_copied_to_a_process(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"], "other": ["x", "y"]}).save_to_disk(tmp_path / "set")
    sources = find_sources([f"hf:{tmp_path}/set"], text_key="other")
    pickled = pickle.dumps(sources)
    assert len(pickled) < 300
    write_arrays(pickle.loads(pickled), tmp_path / "many", tokenizer, "tiny", text_key="other")
    assert tokenizer.decode(stream(tmp_path / "many" / INDEX)) == "</s>x</s>y</s>"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_ended_goes_on(sent, tmp_path, tokenizer):
    code = "from opt_jax.data import shards; shards._INPUT = 1; from opt_jax.cli import main; raise SystemExit(main())"
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("def f(x):\n    return x\n" * 30_000)
    command = [sys.executable, "-c", code, "tokenize", *(str(tmp_path / f"{i}.txt") for i in range(8))]
    command += ["--workers", "2", "--output", str(tmp_path / "many")]
    new = tmp_path / ".many.new" / "new"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(new.glob("opt-jax-*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    shown = process.communicate()[1]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sent, -signal.SIGKILL)
    arrays = [entry.with_suffix(".npy") for entry in new.glob("opt-jax-*.json")]  # the entry is written last
    finished = {path.name: path.stat().st_mtime_ns for path in arrays}
    assert 3 <= len(finished) < 8 and not (tmp_path / "many").exists()
    if sent != signal.SIGKILL:
        assert f"{len(finished)} of 8 arrays are finished" in shown and "Traceback" not in shown
        assert not list(new.glob("*.part"))
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert again.returncode == 0, again.stderr
    many = tmp_path / "many"
    assert {name: (many / name).stat().st_mtime_ns for name in finished} == finished
    assert sorted(os.listdir(many)) == [*(f"opt-jax-{i:05}.npy" for i in range(8)), INDEX]
    write_tokens([tmp_path / f"{i}.txt" for i in range(8)], tmp_path / "one.npy", tokenizer, "tiny")
    np.testing.assert_array_equal(stream(many / INDEX), np.load(tmp_path / "one.npy"))
