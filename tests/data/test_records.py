"""Files of records, compressed files and URLs: each gives the documents that a .jsonl file of the same texts gives."""

import csv
import gzip
import io
import json
import tracemalloc

import numpy as np
import pytest
from etils.epath import Path

from opt_jax.cli import main
from opt_jax.data import files, records
from opt_jax.data.corpus import Corpus
from opt_jax.data.documents import find_sources, read_documents
from opt_jax.data.files import find_files
from opt_jax.data.records import BadRecords

TEXTS = ["one", 'two "quoted", with\ta tab', "three\nlines\n\nhere", "naïve 文字 😀", " ", "x" * 3000]
DOCUMENTS = [text for text in TEXTS if text.strip()]


def as_lines(texts, key="text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def as_csv(texts, separator=",", key="text") -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([["id", key], *([i, text] for i, text in enumerate(texts))])
    return out.getvalue().encode()


def as_table(texts, form="parquet", key="text", **options) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, out = pa.table({"id": list(range(len(texts))), key: texts}), io.BytesIO()
    if form == "parquet":
        pq.write_table(table, out, **options)
    else:
        new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    import zstandard

    half = len(content) // 2  # two frames, as parallel compressors write
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


FORMS = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "b.json": as_lines,
    "c.json": lambda texts: json.dumps([{"id": 1, "text": text} for text in texts]).encode(),
    "d.JSON": lambda texts: b"\xef\xbb\xbf" + json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "e.csv": as_csv,
    "f.tsv": lambda texts: as_csv(texts, "\t"),
    "g.parquet": as_table,
    "h.parquet": lambda texts: as_table(texts, row_group_size=2, use_dictionary=True, compression="zstd"),
    "i.arrow": lambda texts: as_table(texts, "file"),
    "j.arrow": lambda texts: as_table(texts, "stream"),
    "k.jsonl.gz": lambda texts: gzip.compress(as_lines(texts[:2])) + gzip.compress(as_lines(texts[2:])),
    "l.jsonl.ZST": lambda texts: zstd(as_lines(texts)),
    "m.json.gz": lambda texts: gzip.compress(FORMS["c.json"](texts)),
    "n.csv.zst": lambda texts: zstd(as_csv(texts)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(FORMS[name](TEXTS))
    assert read_documents(find_files([tmp_path / name])) == DOCUMENTS
    monkeypatch.setattr(records, "_CHUNK", 7)  # values that do not fit into what is read at once
    monkeypatch.setattr(files, "_BUFFER", 11)
    monkeypatch.setattr(files, "_ZSTD_INPUT", 5)
    assert read_documents(find_files([tmp_path / name])) == DOCUMENTS


@pytest.mark.parametrize("compress, ending", [(gzip.compress, ".gz"), (zstd, ".zst")])
def test_compressed_text_is_the_text(tmp_path, compress, ending):
    (tmp_path / f"a.txt{ending}").write_bytes(compress(b"one\r\ntwo\n"))
    assert read_documents(find_files([tmp_path / f"a.txt{ending}"])) == ["one\ntwo\n"]


@pytest.mark.parametrize("name, content", [("a.json", b"[]"), ("a.json", b" [ ] \n"), ("a.csv", as_csv([]))])
def test_files_without_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="no documents"):
        read_documents(find_files([tmp_path / name]))


DAMAGED = {
    "a.json": (b'[{"text": "one"}, {"text": "two"]', r"not a JSON array \(Expecting ',' delimiter after 1 elements\)"),
    "b.json": (b'[{"text": "one"}\n', r"not a JSON array \(expected , or \] after 1 elements\)"),
    "c.json": (b'[{"text": "one"}] {"text": "two"}', r"not a JSON array \(text behind the array after 1"),
    "d.json": (b'[{"text": "one"} {"text": "two"}]', r"not a JSON array \(expected , or \] after 1"),
    "e.json": (b'[{"text": "one"},]', r"not a JSON array \(Expecting value after 1"),
    "f.json": (b'[{"text": "\xff"}]', "not UTF-8 text"),
    "g.json": (b"[" * 100_000, r"not a JSON array \((too many levels|Expecting value)"),
    "h.json": (b'[{"text": "one"}, 7]', r'h.json: element 1: expected an object with a string under "text"'),
    "i.json": (b'{\n "text": "one"\n}', r"i.json:1: not JSON"),
    "j.csv": (b'text\n"one\n', r"j.csv:\d: not CSV"),
    "k.csv": (b"text,label\none\n", r"k.csv:2: 1 fields, not 2"),
    "l.csv": (b"label,body\n1,one\n", r'l.csv: no column "text", but label, body: choose one by --text-key'),
    "m.csv": (b"text,text\n1,one\n", r'more than one column "text"'),
    "n.parquet": (as_table(TEXTS)[:-9], r"n.parquet: cannot be read \(.*: damaged or cut short"),
    "o.parquet": (b"text", "does not begin as a file in the format parquet"),
    "p.parquet": (as_table([1, 2]), r'column "text" holds int64, not strings'),
    "q.parquet": (as_table(["one", None]), r"row 1: expected an object with a string"),
    "r.arrow": (as_table(TEXTS, "stream")[:-300], r"r.arrow: cannot be read"),
    "s.jsonl.gz": (gzip.compress(as_lines(TEXTS))[:-12], r"cannot be decompressed \(.*\): damaged or cut short"),
    "t.jsonl.gz": (b"text", "cannot be decompressed"),
    "u.jsonl.zst": (zstd(as_lines(TEXTS))[:-9], r"cannot be decompressed \(it ends within a frame\)"),
    "v.txt.zst": (zstd(b"text " * 99)[:20] + b"\xff" * 20, r"cannot be decompressed"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_line_with_the_place(tmp_path, name):
    content, error = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error) as raised:
        read_documents(find_files([tmp_path / name]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name, content", [
    ("a.json", b'[{"text": "one"}, {"body": 1}, "two", {"text": "\\ud800"}, {"text": "three"}]'),
    ("a.csv", b'text,label\none,1\ntwo\n"three",2\n\n'),
    ("a.parquet", as_table(["one", None, "three"])),
])  # fmt: skip
def test_bad_records_are_left_out(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    bad = BadRecords(skip=True)
    assert read_documents(find_files([tmp_path / name]), bad) == ["one", "three"]
    assert bad.count == {"a.json": 3, "a.csv": 1, "a.parquet": 1}[name]


def test_decompressed_data_is_never_in_memory_whole(tmp_path):
    digits = np.random.default_rng(0).integers(0, 10**9, 2000 * 200).reshape(2000, 200).tolist()
    lines = "".join(json.dumps({"text": f"{row} " * 10}) + "\n" for row in digits)  # 44 MB
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(lines.encode()))
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        reader = records.reader_of(tmp_path / name)
        assert reader is not None
        tracemalloc.start()
        assert sum(1 for _ in reader(tmp_path / name, BadRecords(None), "text")) == 2000
        assert tracemalloc.get_traced_memory()[1] < 15e6
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_another_key(tmp_path, form, capsys):
    content = {
        "jsonl": as_lines(TEXTS, "body"),
        "json": b"[" + as_lines(TEXTS, "body").replace(b"\n", b",")[:-1] + b"]",
        "csv": as_csv(TEXTS, key="body"),
        "parquet": as_table(TEXTS, key="body"),
    }[form]
    (tmp_path / f"a.{form}").write_bytes(content)
    with pytest.raises(ValueError, match='"text"'):
        Corpus([str(tmp_path / f"a.{form}")])
    training = Corpus([str(tmp_path / f"a.{form}")], text_key="body").training
    assert "".join(training).startswith("on")  # the end of each document is held out
    out = tmp_path / "a.npy"
    assert main(["tokenize", str(tmp_path / f"a.{form}"), "--output", str(out), "--text-key", "body"]) in (0, None)
    (tmp_path / "same.jsonl").write_bytes(as_lines(TEXTS))
    main(["tokenize", str(tmp_path / "same.jsonl"), "--output", str(tmp_path / "same.npy")])
    np.testing.assert_array_equal(np.load(out), np.load(tmp_path / "same.npy"))
    assert json.loads((tmp_path / "a.npy.json").read_text())["text_key"] == "body"
    with pytest.raises(ValueError, match="--text-key without effect"):
        Corpus([str(out)], text_key="body")


def test_urls(tmp_path, monkeypatch, capsys):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/b.jsonl.gz": gzip.compress(as_lines(["b"])), "/corpus/a.parquet": as_table(["a"])})
    memory.pipe({"/corpus/in/c.txt": b"c", "/corpus/d.csv": as_csv(["d"]), "/corpus/e.npy": b"x"})
    assert read_documents(find_sources(["memory://corpus/d.csv"])) == ["d"]
    assert read_documents(find_sources(["memory://corpus/*.[pj]*"])) == ["a", "b"]
    assert read_documents(find_sources(["memory://corpus"], files.TEXT_SUFFIXES)) == ["a", "b", "c"]
    assert "memory://corpus: what is not read: 1 .csv, 1 .npy" in capsys.readouterr().err
    for name, error in {
        "memory://corpus/*.txt": "nothing matches",
        "memory://nowhere/a.txt": "no such file or directory",
        "memory://corpus/e.npy": "memory-mapped: copy it to a disk",
        "nosuch://corpus/a.txt": r"nosuch://corpus/a.txt: cannot be read here: .*gs:// needs the package gcsfs",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            find_sources([name])
    with monkeypatch.context() as patch:  # a network that is down is no missing file

        def fail(*args, **kwargs):
            raise ConnectionError("no network")

        patch.setattr(type(memory), "info", fail)
        with pytest.raises(OSError, match=r"memory://corpus/a.txt: cannot be read: no network"):
            find_sources(["memory://corpus/a.txt"])
    out = tmp_path / "a.npy"
    main(["tokenize", "memory://corpus/in", "--output", str(out)])
    assert np.load(out).tolist() == [2, *np.load(out)[1:-1].tolist(), 2]
    (source,) = find_files(["memory://corpus/in/c.txt"])
    memory.rm("/corpus/in/c.txt")
    with pytest.raises(FileNotFoundError, match=r"corpus/in/c.txt: cannot be read"):
        read_documents([source])


def test_a_bucket(monkeypatch):
    """gs:// against a server of this machine, by gcsfs."""
    from support.gcs_server import serve

    with serve() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        for name, content in {"a.jsonl": as_lines(["a"]), "b.txt.gz": gzip.compress(b"b")}.items():
            Path(f"gs://bucket/corpus/{name}").write_bytes(content)
        assert read_documents(find_sources(["gs://bucket/corpus"])) == ["a", "b"]
