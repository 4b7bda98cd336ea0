"""The built-in text: enough of it, real, clean, the same every time, and nothing of this machine in it."""

import re
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.data.builtin_text import _MIN_CHARACTERS, MIN_BYTES, builtin_documents, clean
from deepspeed_sdp.errors import DataError
from tests.support.ranks import ROOT, rank_environment


@pytest.fixture(scope="session")
def builtin():
    return builtin_documents(max_bytes=MIN_BYTES)


def test_it_is_as_large_as_asked_for(builtin):
    size = sum(len(text.encode()) for text in builtin)
    assert size >= MIN_BYTES
    assert size - len(builtin[-1].encode()) < MIN_BYTES, "stops with the document that reaches the size"


@pytest.mark.slow
def test_it_is_the_same_in_another_process_with_another_hash_seed(builtin, tmp_path):
    code = (
        "from hashlib import sha256; from deepspeed_sdp.data.builtin_text import *;"
        "print(sha256('\\0'.join(builtin_documents(2_000_000)).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=rank_environment(PYTHONHASHSEED="12345"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split()[-1] == sha256("\0".join(builtin).encode()).hexdigest()


def test_no_document_comes_twice(builtin):
    assert len({" ".join(text.split()).lower() for text in builtin}) == len(builtin)


def test_documents_are_clean_prose(builtin):
    for text in builtin:
        assert len(text) >= _MIN_CHARACTERS
        assert text == text.strip()
        assert not set(text) & set("\t\r\x00\x0c\x7f")
        assert "\n\n\n" not in text
        assert " \n" not in text
        assert sum(c.isalpha() or c == " " for c in text) > 0.6 * len(text)


def test_it_names_no_folder_of_this_machine(builtin):
    text = "\n".join(builtin)
    folders = {str(ROOT), str(Path.home()), *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix}
    for folder in folders - {"/usr", "/"}:
        # "/root" is also what the standard library's documentation may speak of.
        assert not re.search(re.escape(folder) + r"(/|\b)", text), folder


def test_too_small_a_size_is_refused():
    with pytest.raises(DataError, match=r"built-in text: got a size of 0.5 MB; takes at least 2 MB"):
        builtin_documents(max_bytes=500_000)


def test_an_installation_with_little_text_is_refused(monkeypatch):
    monkeypatch.setattr("deepspeed_sdp.data.builtin_text._raw_documents", lambda: iter(["word " * 100]))
    with pytest.raises(DataError, match=r"found 0.0 MB .* needs 2 MB: give text files instead \(--text\)"):
        builtin_documents()


def test_documents_that_cannot_be_encoded_are_passed_over(monkeypatch, builtin):
    raw = ["half a character \ud800 " * 20, *builtin, "never reached " * 20]
    monkeypatch.setattr("deepspeed_sdp.data.builtin_text._raw_documents", lambda: iter(raw))
    assert "\n".join(builtin_documents(MIN_BYTES)).encode()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("First.\n\n    Indented.\n        More.\n    ", "First.\n\nIndented.\n    More."),
        ("a  \nb\t\nc", "a\nb\nc"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("a\r\nb", "a\nb"),
        ("a\x00b\x07c\x7f", "abc"),
        ("   \n \n", ""),
    ],
)
def test_cleaning(raw, expected):
    assert clean(raw) == expected


@given(st.text(alphabet=st.sampled_from("ab \t\n\r\x00\x0c\x7fé"), max_size=60))
def test_cleaned_text_keeps_its_words_and_has_no_control_characters(raw):
    text = clean(raw)
    assert not set(text) & set("\t\r\x00\x0c\x7f")
    assert "\n\n\n" not in text
    assert text == text.strip()
    assert not re.search(r" $", text, re.MULTILINE)
    dropped = str.maketrans("", "", " \t\n\r\x00\x0c\x7f")
    assert text.translate(dropped) == raw.translate(dropped)
