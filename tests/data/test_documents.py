"""Reading text: files of other formats, directories, bad records, long lines, pipes."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import zipfile

import numpy as np
import pytest

from opt_jax import OPTTokenizer
from opt_jax.cli import main
from opt_jax.data import documents, records
from opt_jax.data.corpus import Corpus
from opt_jax.data.documents import pieces, read_documents
from opt_jax.data.files import find_files
from opt_jax.data.records import BadRecords
from opt_jax.data.tokens import tokenize
from opt_jax.evaluation.command import read_ids

RECORDS = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("tiny")


def zipped() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a.txt", "text")
    return raw.getvalue()


def numpy_file() -> bytes:
    raw = io.BytesIO()
    np.save(raw, np.arange(9))
    return raw.getvalue()


OTHERS = {
    # known by their first bytes, not by their name
    "a.txt": (gzip.compress(RECORDS), "gzip"),
    "b.jsonl": (gzip.compress(RECORDS), "gzip"),
    "c.md": (b"\x28\xb5\x2f\xfd rest", "zstd"),
    "d": (bz2.compress(RECORDS), "bz2"),
    "e.txt": (lzma.compress(RECORDS), "xz"),
    "f.txt": (zipped(), "zip"),
    "g.txt": (b"PAR1\x15\x04 text PAR1", "parquet"),
    "h.txt": (b"ARROW1\0\0", "arrow"),
    "i.NPY": (numpy_file(), "NumPy"),
    "j.txt": (b"%PDF-1.7", "PDF"),
    "k.txt": ("text".encode("utf-16"), "UTF-16"),
    "l.jsonl": (b'[{"text": "one"},\n {"text": "two"}]', "JSON"),
    "m.jsonl": (b'\xef\xbb\xbf[\n  {\n "text": "one"}\n]', "JSON"),
    "n.txt": (RECORDS, "JSON"),
    "o.md": (b'{\n  "data": []\n}', "JSON"),
    "p.txt": (b"some \0 text", "binary"),
    "aa.txt": (b"\n%PDF-1.4", "PDF"),
    "ab.txt": (b"%!PS-Adobe-3.0\n", "PostScript"),
    "ac.txt": (rb"{\rtf1\ansi text}", "RTF"),
    "ad.txt": (b"Obj\x01\x04\x14avro.codec", "avro"),
    "ae.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
    "af.txt": (b'["one \\"text\\"",\n "two"]', "JSON"),
    # known by the ending of the name, not by the content
    "q.jsonl.7Z": (b"text", "7z"),
    "r.parquet.GZ": (b"text", "parquet inside of gzip"),
    "s.xlsx": (b"text,label\n", "xlsx"),
    "t.tgz": (b"text", "tar"),
    "x.zstd": (b"text", "zstd"),
    # by the ending of what is compressed
    "y.pdf.gz": (b"text", "pdf"),
    # by what it decompresses to
    "z.txt.gz": (gzip.compress(b"PAR1"), "parquet"),
    "za.csv.gz": (gzip.compress(b"some \0 text"), "binary"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_name(tmp_path, name):
    content, kind = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    message = rf"{name}: {kind} is a format that is not read as text: \w+"
    with pytest.raises(ValueError, match=message):
        find_files([tmp_path / name])
    with pytest.raises(ValueError, match=message):
        find_files([f"{tmp_path}/{name[0]}*"])
    for skip in (False, True, None):  # --skip-bad-records makes no difference
        with pytest.raises(ValueError, match=message):
            read_documents([tmp_path / name], BadRecords(skip))


def test_leaving_out_bad_records_needs_text(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "b.txt").write_text("text")
    array, text = str(tmp_path / "a.npy"), str(tmp_path / "b.txt")
    for names in ((array,), (array, array)):
        with pytest.raises(ValueError, match="--skip-bad-records without effect: all data is token ids"):
            Corpus([array], names[1:], skip_bad=True)
    Corpus([array], [text], skip_bad=True)
    Corpus([text], [array], skip_bad=True)
    Corpus([array])


def test_every_command_refuses_them(tmp_path, tokenizer, capsys):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(RECORDS))
    source = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="gzip is a format"):
        Corpus([source], skip_bad=True)
    with pytest.raises(ValueError, match="gzip is a format"):
        Corpus([], [source])
    with pytest.raises(ValueError, match="gzip is a format"):
        read_ids([source], tokenizer)
    assert main(["tokenize", source, "--skip-bad-records", "--output", str(tmp_path / "a.npy")]) == 1
    assert "gzip is a format that is not read as text: add .gz to its name" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]


@pytest.mark.parametrize(
    "text", ["[1] a footnote", "{curly} braces", '{"quoted"} braces', "PK is short for it", "[[x]]", '["so," he said]']
)
def test_prose_that_begins_like_another_format_is_prose(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read_documents(find_files([tmp_path / "a.txt"])) == [text]


def test_a_directory_says_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in ("a.avro", "sub/b.avro", "c.Csv", "README", "x.npy.json"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"looked for .*; there are 2 \.avro, "):
        find_files([tmp_path])
    (tmp_path / "d.TXT").write_text("text")
    assert find_files([tmp_path]) == [tmp_path / "d.TXT"]
    shown = capsys.readouterr().err
    assert shown.startswith(f"left out: {tmp_path}: what is not read: 2 .avro, ")
    assert "1 .csv" in shown and "1 without ending" in shown and ".json" not in shown and shown.count("\n") == 1
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.jsonl").write_bytes(RECORDS)
    find_files([tmp_path / "only"])
    assert capsys.readouterr().err == ""


def test_a_directory_names_what_it_does_not_follow_or_cannot_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (data := tmp_path / "data").mkdir()
    (data / "a.txt").write_text("text")
    (data / "shards").symlink_to(tmp_path / "elsewhere")
    (data / "round").symlink_to(".")
    assert find_files([data]) == [data / "a.txt"]
    assert "not read: 2 linked directories (name them" in capsys.readouterr().err
    (data / "sub").mkdir()
    real = os.scandir

    def scan(path):
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PermissionError, match="data/sub"):
        find_files([data])


def test_endings_count_in_capitals_too(tmp_path):
    (tmp_path / "a.JSONL").write_bytes(RECORDS)
    assert read_documents(find_files([tmp_path / "a.JSONL"])) == ["one", "two"]


@pytest.mark.parametrize(
    "content, bad, read",
    [
        ('{"content": "one"}\n' * 3, 3, 0),
        ('{"content": "one"}\n' * 150 + '{"text": "two"}\n' * 149, 150, 149),
        ("{\n" + '"text": "pretty"\n}\n', 3, 0),
    ],
)
def test_a_whole_file_is_not_left_out(tmp_path, capsys, content, bad, read):
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.txt").write_text("fine")
    message = f"a.jsonl: {bad} of its {bad + read} records cannot be read, too many for --skip-bad-records"
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"], BadRecords(True))
    assert f"{tmp_path}/a.jsonl:1: " in capsys.readouterr().err


def test_text_in_another_encoding_is_not_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes("na\u00efve\n".encode("latin-1") * 9)
    with pytest.raises(ValueError, match=r"a\.txt: 9 of its 9 records cannot be read.*not UTF-8 text"):
        read_documents([tmp_path / "a.txt"], BadRecords(True))


@pytest.mark.parametrize("bad", [100, 101])
def test_as_many_bad_records_as_good_ones_may_be_left_out(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 101 + "{}\n" * bad)
    assert len(read_documents([tmp_path / "a.jsonl"], BadRecords(True))) == 101


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="pipe.txt is not a regular file"):
        find_files([tmp_path / "pipe.txt"])
    with pytest.raises(ValueError, match="pipe.txt is not a regular file"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="pipe.txt is not a regular file"):
        read_documents([tmp_path / "pipe.txt"])
    (tmp_path / "real.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    assert read_documents(find_files([tmp_path / "link.txt"])) == ["text"]


def test_long_lines_are_read_in_parts(tmp_path, monkeypatch, tokenizer):
    text = "it's  one\tline - of \N{SNOWMAN} def f(x): \n and\r\n two   spaces\n" * 20
    (tmp_path / "a.txt").write_bytes(("\ufeff" + text).encode())
    expected = read_documents([tmp_path / "a.txt"])
    for part in range(3, 20):  # cuts within characters, and between \r and \n
        monkeypatch.setattr(documents, "_PART", part)
        assert read_documents([tmp_path / "a.txt"]) == expected
        assert "".join(piece for piece, _ in pieces([tmp_path / "a.txt"], BadRecords(), 8)) == expected[0]
    (tmp_path / "b.txt").write_bytes("fine \u2603".encode()[:-1])
    with pytest.raises(ValueError, match=r"b\.txt:1: not UTF-8 text"):
        read_documents([tmp_path / "b.txt"])
    for part in (3, 7, 8):
        monkeypatch.setattr(documents, "_PART", part)
        with pytest.raises(ValueError, match=r"b\.txt:1: not UTF-8 text"):
            read_documents([tmp_path / "b.txt"])


def test_documents_are_tokenised_piece_by_piece(tmp_path, tokenizer, monkeypatch):
    text = "def f(x): return [x, 1] # it's  one\tline \n and two " * 40
    monkeypatch.setattr("opt_jax.data.tokens.BLOCK", 10)
    longest = []
    call = OPTTokenizer.__call__
    monkeypatch.setattr(
        OPTTokenizer,
        "__call__",
        lambda self, texts, *args, **kw: (
            longest.extend(map(len, texts if isinstance(texts, list) else [])) or call(self, texts, *args, **kw)
        ),
    )
    ids = tokenize([text, " ", text], tokenizer)
    assert max(longest) < 40
    row = call(tokenizer, text, return_tensors=None, add_special_tokens=False).input_ids
    blank = call(tokenizer, " ", return_tensors=None, add_special_tokens=False).input_ids
    assert ids.tolist() == [2, *row, 2, *blank, 2, *row, 2]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    read, count = read_ids([str(tmp_path / "a.jsonl")], tokenizer)
    assert read.tolist() == [2, *row] and count == 1


def test_limits_of_a_record_and_of_a_text_without_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_RECORD", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(RECORDS + b'{"text": "' + b"x" * (1 << 21) + b'"}\n' + RECORDS)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: a record of 1 MiB or more; --skip-bad-records"):
        read_documents([tmp_path / "a.jsonl"], BadRecords())
    assert read_documents([tmp_path / "a.jsonl"], BadRecords(True)) == ["one", "two", "one", "two"]
    monkeypatch.setattr(documents, "_LONGEST", 1 << 20)
    (tmp_path / "a.txt").write_text("short\n" + "x" * (1 << 21))
    with pytest.raises(ValueError, match=r"a\.txt:2: 1 Mi characters without a space"):
        list(pieces([tmp_path / "a.txt"], BadRecords(), 1000))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * (1 << 20) + " x"}))
    monkeypatch.setattr(records, "_RECORD", 1 << 24)
    assert len(list(pieces([tmp_path / "b.jsonl"], BadRecords(), 1000))) == 2
    monkeypatch.setattr(documents, "_LONGEST", 1 << 19)
    with pytest.raises(ValueError, match=r"b\.jsonl: 0 Mi characters without a space"):
        list(pieces([tmp_path / "b.jsonl"], BadRecords(), 1000))


def test_a_glob_says_what_it_leaves_out(tmp_path, capsys):
    for name in ("a.txt", "sub/b.txt", "other/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert find_files([f"{tmp_path}/*"]) == [tmp_path / "a.txt"]
    assert capsys.readouterr().err == f"left out: {tmp_path}/*: 2 directories (name them as well to read them)\n"
    assert len(find_files([f"{tmp_path}/**"])) == 3 and capsys.readouterr().err == ""
    (tmp_path / "d.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"d\.txt"):
        find_files([f"{tmp_path}/*.txt"])


@pytest.mark.parametrize("pattern", ["*/*.txt", "**/*.txt", "**", "s*/deeper/*"])
def test_a_glob_does_not_pass_over_a_directory_that_cannot_be_read(tmp_path, monkeypatch, pattern):
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for name in ("a/a.txt", "sub/b.txt", "sub/deeper/c.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)  # another user cannot read the directories above
    tmp_path.chmod(0o755)
    closed = tmp_path / "sub" / "deeper" if "deeper" in pattern else tmp_path / "sub"
    closed.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root can read everything
        with pytest.raises(PermissionError, match=closed.name):
            find_files([pattern])
    finally:
        os.seteuid(user)
        closed.chmod(0o755)
