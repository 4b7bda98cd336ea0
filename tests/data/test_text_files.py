"""Reading users' files: every kind, and one clear message for everything that can be wrong with them."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspeed_sdp.data import read_documents
from deepspeed_sdp.errors import DataError

TEXTS = ["First document.\nTwo lines.", "Zweites: größer, 日本語, 👍🏽", "third"]


def jsonl(texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def parquet(folder, columns, name="x.parquet"):
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write_file


@pytest.mark.parametrize("separator", ["\n\n\n", "\n\n\n\n\n", "\n \n\t\n", "\f", "\r\n\r\n\r\n"])
def test_documents_of_a_txt_file_are_separated(write, separator):
    assert read_documents([write("a.txt", separator.join(TEXTS))]) == TEXTS


def test_one_blank_line_separates_paragraphs_not_documents(write):
    assert read_documents([write("a.txt", "one\n\ntwo")]) == ["one\n\ntwo"]


def test_jsonl_plain_and_compressed(write):
    assert read_documents([write("a.jsonl", jsonl(TEXTS))]) == TEXTS
    assert read_documents([write("a.jsonl.gz", gzip.compress(jsonl(TEXTS)))]) == TEXTS
    assert read_documents([write("B.JSONL.GZ", gzip.compress(jsonl(TEXTS)))]) == TEXTS
    assert read_documents([write("b.jsonl", b"\n" + jsonl(TEXTS) + b"\n  \n")]) == TEXTS, "blank lines are passed over"


def test_missing_values_are_passed_over(write):
    content = b'{"text": null}\n' + jsonl(TEXTS) + b'{"text": null}'
    assert read_documents([write("a.jsonl", content)]) == TEXTS


def test_a_line_separator_inside_a_json_string_is_no_line_end(write):
    content = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    assert read_documents([write("a.jsonl", content)]) == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.string()),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([TEXTS[0], None, *TEXTS[1:]]),
    ],
    ids=lambda column: f"{column.type}-{column.null_count}".replace(" ", ""),
)
def test_parquet_with_every_type_of_string(tmp_path, column):
    assert read_documents([parquet(tmp_path, {"id": range(len(column)), "text": column})]) == TEXTS


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    assert read_documents([write("a.txt", b"\xef\xbb\xbfhello")]) == ["hello"]
    assert read_documents([write("a.jsonl", b"\xef\xbb\xbf" + jsonl(["hello"]))]) == ["hello"]


def test_files_and_folders_in_order(write, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("from b")
    (folder / "a.jsonl").write_bytes(jsonl(["from a"]))
    (folder / "README.md").write_text("not this")
    (folder / "nested.txt").mkdir()
    last = write("z.txt", "from z")
    first = write("y.TXT", "from y")
    assert read_documents([first, folder, last]) == ["from y", "from a", "from b", "from z"]


def cut(content):
    return content[: len(content) // 2]


def damaged(content):
    """A compressed stream whose first block is of no known kind."""
    return content[:10] + b"\xff" + content[11:]


NUMBERED = "".join(json.dumps({"text": f"line {i} {i * 7919 % 1000}"}) + "\n" for i in range(2000)).encode()

BAD_FILES = {
    "empty txt": ("a.txt", b"", "a.txt: holds no text"),
    "blank txt": ("a.txt", b" \n\n\n\t\n \x0c \n", "a.txt: holds no text"),
    "only a byte order mark": ("a.txt", b"\xef\xbb\xbf", "a.txt: holds no text"),
    "empty jsonl": ("a.jsonl", b"", "a.jsonl: holds no text"),
    "jsonl of blank texts": ("a.jsonl", jsonl(["", "  "]), "a.jsonl: holds no text"),
    "empty gz": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: holds no text"),
    "empty parquet file": ("a.parquet", b"", "a.parquet: is no readable parquet file: .*0 bytes"),
    "wrong suffix": (
        "a.csv",
        b"text\nhello",
        r"a.csv: is no text file by its name; takes .txt, .jsonl, .jsonl.gz or .parquet",
    ),
    "no suffix": ("text", b"hello", "text: is no text file by its name"),
    "gz of an unknown kind": ("a.txt.gz", gzip.compress(b"hello"), "a.txt.gz: is no text file by its name"),
    "txt not UTF-8": ("a.txt", "größer".encode("latin-1"), r"a.txt: is not UTF-8 text \(byte 2\)"),
    "jsonl not UTF-8": ("a.jsonl", b'{"text": "gr\xf6\xdfer"}', "a.jsonl: is not UTF-8 text"),
    "gz not UTF-8": ("a.jsonl.gz", gzip.compress(b'{"text": "gr\xf6\xdfer"}'), "a.jsonl.gz: is not UTF-8 text"),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), r"a.txt: is not UTF-8 text \(byte 0\)"),
    "broken JSON": ("a.jsonl", jsonl(TEXTS) + b'{"text": "a"\n', "a.jsonl: line 4 is not valid JSON: Expecting"),
    "broken JSON after a blank line": ("a.jsonl", b"\n\n}\n", "a.jsonl: line 3 is not valid JSON"),
    "a JSON array": ("a.jsonl", b'["text"]', "a.jsonl: line 1 has a list; takes an object with a 'text' column"),
    "no text key": (
        "a.jsonl",
        jsonl(TEXTS) + b'{"content": "a", "id": 3}',
        "a.jsonl: line 4 has the keys 'content', 'id'; takes an object with a 'text' column",
    ),
    "text is a number": ("a.jsonl", b'{"text": 5}', "a.jsonl: line 1: 'text' is a int; takes a string"),
    "jsonl of missing texts": ("a.jsonl", b'{"text": null}\n' * 2, "a.jsonl: holds no text"),
    "half a surrogate pair": (
        "a.jsonl",
        jsonl(TEXTS) + b'{"text": "abc \\ud83d"}',
        r"a.jsonl: line 4: 'text' holds half a character \('\\ud83d'\)",
    ),
    "brackets without end": ("a.jsonl", b"[" * 200_000, "a.jsonl: line 1 is not usable JSON"),
    "a number without end": ("a.jsonl", b'{"text": %s}' % (b"1" * 5000), "a.jsonl: line 1 is not usable JSON"),
    "cut gz": ("a.jsonl.gz", cut(gzip.compress(NUMBERED)), "a.jsonl.gz: is cut off in its compressed data"),
    "damaged gz": ("a.jsonl.gz", damaged(gzip.compress(NUMBERED)), "a.jsonl.gz: is damaged in its compressed data"),
    "not compressed": ("a.jsonl.gz", jsonl(TEXTS), "a.jsonl.gz: cannot be read: Not a gzipped file"),
    "no parquet": ("a.parquet", jsonl(TEXTS) * 10, "a.parquet: is no readable parquet file: "),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(write, case):
    name, content, message = BAD_FILES[case]
    good = write("good.txt", "good")
    with pytest.raises(DataError, match=message) as raised:
        read_documents([good, write(name, content)])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_cut_parquet(tmp_path):
    file = parquet(tmp_path, {"text": [f"document {i}" for i in range(5000)]})
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(DataError, match=r"x.parquet: is no readable parquet file: "):
        read_documents([file])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["a"], "id": [1]}, "has the columns 'content', 'id'; takes one named 'text'"),
        ({"text": [1, 2]}, "column 'text' is int64; takes strings"),
        ({"text": pa.array([b"a"])}, "column 'text' is binary; takes strings"),
        ({"text": pa.array([1, 1]).dictionary_encode()}, "column 'text' is int64; takes strings"),
        ({"text": [["a"]]}, "column 'text' is list.*; takes strings"),
        ({"text": pa.array([], pa.string())}, "holds no text"),
        ({"text": pa.array([None, ""], pa.string())}, "holds no text"),
    ],
)
def test_parquet_without_usable_text(tmp_path, columns, message):
    with pytest.raises(DataError, match=f"x.parquet: {message}"):
        read_documents([parquet(tmp_path, columns)])


def test_parquet_whose_strings_are_not_utf8(tmp_path):
    offsets = pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    bad = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    with pytest.raises(DataError, match=r"x.parquet: is not UTF-8 text"):
        read_documents([parquet(tmp_path, {"text": bad})])


def test_missing_and_unreadable(tmp_path, write):
    file = write("a.txt", "hello")
    with pytest.raises(DataError, match=r"gone.txt: does not exist; takes .txt, .jsonl or .parquet files or folders"):
        read_documents([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match=r"a.txt/b.txt: does not exist"):
        read_documents([file / "b.txt"])
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_documents([tmp_path / ("a" * 300 + ".txt")])
    (tmp_path / "memory.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"memory.txt: cannot be read: Input/output error"):
        read_documents([tmp_path / "memory.txt"])


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe.txt: cannot be read: Not a directory"):
        read_documents([tmp_path / "pipe.txt"])


def test_folders_without_text(tmp_path):
    folder = tmp_path / "looks_like.txt"
    folder.mkdir()
    (folder / "README.md").write_text("hello")
    with pytest.raises(DataError, match=r"looks_like.txt: holds no .txt, .jsonl or .parquet file"):
        read_documents([folder])
    (folder / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"looks_like.txt/empty.txt: holds no text"):
        read_documents([folder])
