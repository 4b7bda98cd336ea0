"""Documents of plain text, whatever blocks it comes in, and what may be wrong with a file of it."""

import io
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.data import ShardOptions, SourceSpec, plain_text, prepare_shards
from deepspeed_sdp.data.faults import FaultPolicy
from deepspeed_sdp.data.plain_text import split_text
from deepspeed_sdp.data.source import find_source
from deepspeed_sdp.errors import DataError
from tests.data.conftest import make_documents
from tests.data.test_reading import read

TEXTS = ["First document.\nTwo lines.\n\nA paragraph.", "Zweites: größer, 日本語, 👍🏽", "third"]


@pytest.mark.parametrize("separator", ["\n\n\n", "\n\n\n\n\n", "\n \n\t\n", "\f", "\r\n\r\n\r\n"])
def test_documents_are_separated(tmp_path, separator):
    for mark in ("", "\ufeff"):
        (tmp_path / "a.txt").write_bytes((mark + separator.join(TEXTS)).encode())
        assert read(tmp_path / "a.txt")[0] == TEXTS


@given(st.text(alphabet="ab \n\n\n\f\t", max_size=120), st.integers(1, 40), st.integers(4, 30))
def test_blocks_change_nothing_and_no_character_is_lost(text, block, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "_LONGEST", longest)
        patch.setattr(plain_text, "_BLOCK", block)
        pieces = list(split_text(io.StringIO(text).read))
        patch.setattr(plain_text, "_BLOCK", 1000)
        whole = list(split_text(io.StringIO(text).read))
    assert [piece.rstrip() for piece in pieces if piece.strip()] == [piece.rstrip() for piece in whole if piece.strip()]
    assert all(len(piece.rstrip()) <= longest for piece in pieces)
    assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


def test_a_long_document_is_cut_between_paragraphs_lines_or_words():
    words = "word " * 4000
    for end in ("\n\n", "\n", " "):
        text = end.join(["word " * 150] * 100)
        pieces = list(split_text(io.StringIO(text).read))
        assert "".join(pieces) == text
        assert all(4096 < len(piece) <= 8192 for piece in pieces[:-1])
        assert all(piece.endswith(end) for piece in pieces[:-1])
    assert "".join(split_text(io.StringIO("x" * 30000).read)) == "x" * 30000
    assert len(list(split_text(io.StringIO(words).read))) > 2


def test_a_part_of_one_long_document_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(make_documents(4000)))
    options = ShardOptions(SourceSpec((str(tmp_path / "book.txt"),)), train_tokenizer=320, heldout_fraction=0.05)
    splits = prepare_shards(tmp_path / "out", options, workers=1)["splits"]
    assert 0.02 < splits["heldout"]["tokens"] / splits["train"]["tokens"] < 0.09


def test_in_a_folder_of_data_a_text_is_a_description(tmp_path):
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "A.TXT").write_text("from a")
    (tmp_path / "README.md").write_text("not this")
    (tmp_path / "nested.txt").mkdir()
    assert read(tmp_path)[0] == ["from a", "from b"]
    (tmp_path / "c.jsonl").write_text('{"text": "from c"}')
    assert read(tmp_path)[0] == ["from c"]
    assert read(tmp_path / "c.jsonl", tmp_path / "b.txt")[0] == ["from c", "from b"]


@pytest.mark.parametrize(
    "content", ["größer".encode("latin-1"), "hello".encode("utf-16"), b"a\n\n\n" * 30000 + b"\xff"]
)
def test_text_that_is_not_utf8(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a.txt: text is not UTF-8"):
        read(tmp_path / "a.txt", faults=FaultPolicy())
    found, skipped = read(tmp_path / "a.txt")
    assert skipped.counts == {"file: text is not UTF-8": 1}
    assert set(found) <= {"a"}


@pytest.mark.parametrize("content", [b"", b" \n\n\n\t\n \x0c \n", b"\xef\xbb\xbf"])
def test_a_file_without_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert read(tmp_path / "a.txt")[0] == []


def test_what_cannot_be_a_source(tmp_path):
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, message in {
        "a.csv": "a.csv is of another kind; takes .parquet, .jsonl",
        "gone.txt": "gone.txt does not exist; takes",
        "pipe.txt": "pipe.txt does not exist; takes",
        "folder.txt": "folder.txt holds no such file; takes",
        "a" * 300 + ".txt": "cannot be read: File name too long",
    }.items():
        with pytest.raises(DataError, match=message):
            find_source(SourceSpec((str(tmp_path / name),), option="--text"), None)
