"""The trained tokenizer: exact, an ordinary HuggingFace folder, and clear about vocabularies that cannot be."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from deepspeed_sdp.data import load_tokenizer, train_tokenizer, vocab_size
from deepspeed_sdp.data.encoding import DocumentEncoder
from deepspeed_sdp.data.tokenizer import _LINE_BYTES, _TRAINING_CHARACTERS, _lines
from deepspeed_sdp.errors import DataError
from tests.support.ranks import rank_environment

# sentencepiece writes blanks with this character, so it cannot come back.
BLANK = "\u2581"


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@settings(max_examples=400)
@given(st.text(alphabet=st.characters(exclude_characters=BLANK, exclude_categories=["Cs"])))
@example("  leading, trailing  ")
@example("\n\n\ttabs\r\nand lines\n")
@example("e\u0301 é ﬁ 日本 👍🏽 \u200b\ufeff\u00a0\u2028")
@example("<0x41></s><s><unk>")
@example("\x00\x7f\ufffd")
@example("don 't , stop . I 'm")
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


@given(st.text(alphabet="the catdogw <>s/unk\n1234", max_size=60))
def test_text_never_gives_special_tokens(tokenizer, text):
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} & set(encode(tokenizer, text))


def test_documents_end_with_one_end_token_whatever_they_say(tokenizer):
    stream = np.concatenate(DocumentEncoder(tokenizer)(["the cat</s> dog", "<s>bird", "</s>"]))
    assert (stream == tokenizer.eos_token_id).sum() == 3
    assert tokenizer.decode(stream) == "the cat</s> dog</s><s>bird</s></s></s>"


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 320
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer("the cat")["input_ids"] == encode(tokenizer, "the cat"), "nothing is put around a text"


def test_words_of_the_text_become_tokens(tokenizer):
    assert len(encode(tokenizer, "the cat walks under the tree")) <= 14


def test_training_is_deterministic(documents, tokenizer, tmp_path):
    again = train_tokenizer(documents, 320, tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_an_ordinary_folder_that_loads_without_this_package(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = "the cat\n\n  sees 12 größer </s> 日本"
    code = f"""
import sys
sys.modules["deepspeed_sdp"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
import json
ids = tokenizer({text!r}, add_special_tokens=False, split_special_tokens=True)["input_ids"]
print(json.dumps([ids, tokenizer.decode(ids), tokenizer.eos_token_id]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ids, decoded, eos = json.loads(done.stdout.splitlines()[-1])
    assert (ids, decoded, eos) == (encode(tokenizer, text), text, tokenizer.eos_token_id)


def refused(documents, vocab_size, folder):
    with pytest.raises(DataError) as raised:
        train_tokenizer(documents, vocab_size, folder)
    message = str(raised.value)
    assert message.startswith(f"--vocab_size: got {vocab_size}; ")
    assert "INTERNAL" not in message, "no word of sentencepiece's source"
    assert "\n" not in message
    return message


def test_too_large_a_vocabulary_and_the_largest(documents, tmp_path):
    message = refused(documents[:2], 5000, tmp_path / "a")
    limit = int(re.fullmatch(r".*; the text supports at most (\d+)", message)[1])
    assert len(train_tokenizer(documents[:2], limit, tmp_path / "b")) == limit
    refused(documents[:2], limit + 1, tmp_path / "c")


def test_too_small_a_vocabulary_and_the_smallest(documents, tmp_path):
    message = refused(documents, 100, tmp_path / "a")
    least = int(re.fullmatch(r".*; the characters of the text alone need (\d+); takes at least that", message)[1])
    assert len(train_tokenizer(documents, least, tmp_path / "b")) == least
    refused(documents, least - 1, tmp_path / "c")


@pytest.mark.parametrize("vocab_size", [0, -5])
def test_no_vocabulary(documents, tmp_path, vocab_size):
    assert refused(documents, vocab_size, tmp_path / "a").endswith("takes a positive number")


@pytest.mark.parametrize("documents", [[], [""], ["\n\n"]])
def test_nothing_to_learn_from(tmp_path, documents):
    assert refused(documents, 300, tmp_path / "a").endswith("the text holds no line to learn from")


def test_many_characters_fall_back_to_bytes(documents, tmp_path):
    chinese = "".join(chr(0x4E00 + i) for i in range(2000))
    tokenizer = train_tokenizer([*documents * 40, chinese[:5]], 400, tmp_path / "a")
    assert tokenizer.decode(encode(tokenizer, chinese)) == chinese


def test_a_text_in_one_long_line_is_learned_from(documents, tmp_path):
    line = " ".join(documents) * 20
    assert len(line.encode()) > _LINE_BYTES
    tokenizer = train_tokenizer([line], 320, tmp_path / "a")
    assert len(encode(tokenizer, "the cat walks under the tree")) <= 14


@pytest.mark.parametrize(
    "documents",
    [["some words here\n" * 1_300_000], ["ab " * 7_000_000 + "\n"], ["abcdefg\n" * 100] * 20_000],
    ids=["short lines", "one line", "many documents"],
)
def test_training_takes_a_bounded_part_of_a_large_text(documents):
    assert sum(map(len, _lines(documents))) <= 2 * _TRAINING_CHARACTERS


def test_pieces_are_short_enough_for_sentencepiece():
    assert all(0 < len(piece.encode()) <= _LINE_BYTES for piece in _lines(["\U0001f600" * 100_000, "", "a\n\nb"]))


def folder_with(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_bytes(content)
    return path


def test_folders_that_hold_no_tokenizer(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "whole")
    config = (tmp_path / "whole" / "tokenizer_config.json").read_bytes()
    cases = {
        "missing": (tmp_path / "missing", "is no folder; takes one with"),
        "a name on the hub": (Path("gpt2"), "is no folder; takes one with"),
        "a file": (tmp_path / "whole" / "tokenizer.json", "is no folder; takes one with"),
        "empty": (folder_with(tmp_path / "empty"), "holds no HuggingFace tokenizer: "),
        "broken": (
            folder_with(tmp_path / "broken", tokenizer=b"{", tokenizer_config=config),
            "holds no HuggingFace tokenizer: ",
        ),
        "without a vocabulary": (
            folder_with(tmp_path / "empty_vocabulary", tokenizer_config=config),
            r"holds no vocabulary \(tokenizer.json or the like\)",
        ),
        "wrong": (
            folder_with(tmp_path / "wrong", tokenizer=b'{"model": 5}', tokenizer_config=config),
            "holds no HuggingFace tokenizer: ",
        ),
    }
    for case, (folder, message) in cases.items():
        with pytest.raises(DataError, match=f"--tokenizer: .*{message}") as raised:
            load_tokenizer(folder)
        assert "\n" not in str(raised.value), case


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        tmp_path
    )
    with pytest.raises(DataError, match="has no end-of-sequence token, which separates documents"):
        load_tokenizer(tmp_path)


def test_the_vocabulary_reaches_to_the_largest_id(tokenizer):
    assert vocab_size(tokenizer) == len(tokenizer) == 320
    rules = Tokenizer(WordLevel({"</s>": 0, "a": 1, "b": 39}, unk_token="</s>"))
    gap = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="</s>")
    assert len(gap) == 3
    assert vocab_size(gap) == 40
