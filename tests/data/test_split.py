"""What is held out depends on a document alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.data.split import split_documents
from deepspeed_sdp.errors import DataError
from tests.data.conftest import make_documents

MANY = make_documents(2000, words=8)


def test_independent_of_order():
    train, heldout = split_documents(MANY, 0.1)
    shuffled = random.Random(1).sample(MANY, len(MANY))
    other_train, other_heldout = split_documents(shuffled, 0.1)
    assert (set(train), set(heldout)) == (set(other_train), set(other_heldout))
    assert other_heldout == [text for text in shuffled if text in set(heldout)], "the order is kept"


def test_independent_of_other_documents():
    heldout = set(split_documents(MANY, 0.1)[1])
    fewer, added = MANY[::2], MANY + make_documents(500, seed=9, words=9)
    assert set(split_documents(fewer, 0.1)[1]) == heldout & set(fewer)
    assert set(split_documents(added, 0.1)[1]) & set(MANY) == heldout


def test_a_larger_share_only_adds():
    assert set(split_documents(MANY, 0.05)[1]) < set(split_documents(MANY, 0.2)[1])


def test_the_share_is_as_asked():
    for fraction in (0.02, 0.1, 0.5):
        assert len(split_documents(MANY, fraction)[1]) / len(MANY) == pytest.approx(fraction, abs=0.035)


def test_every_document_is_on_one_side_and_equal_ones_are_together():
    train, heldout = split_documents(MANY + MANY, 0.1)
    assert sorted(train + heldout) == sorted(MANY + MANY)
    assert not set(train) & set(heldout)


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4), st.floats(0.01, 0.9))
def test_few_documents_lose_no_character_and_no_side_is_empty(documents, fraction):
    try:
        train, heldout = split_documents(documents, fraction)
    except DataError:
        assert max(map(len, documents)) == 1 or fraction * max(map(len, documents)) > max(map(len, documents)) - 1
        return
    assert train
    assert heldout
    assert all([*train, *heldout])
    assert sum(map(len, train + heldout)) <= sum(map(len, documents))


def test_one_document_is_cut_at_its_end():
    text = "".join(str(i % 10) for i in range(1000))
    assert split_documents([text], 0.05) == ([text[:950]], [text[950:]])


@pytest.mark.parametrize("documents", [[], ["a"], ["a", "a"]])
def test_too_short_to_hold_anything_out(documents):
    with pytest.raises(DataError, match=rf"text: {len(documents)} characters are too few to hold a part out"):
        split_documents(documents, 0.05)
