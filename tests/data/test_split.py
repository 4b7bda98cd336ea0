"""What is held out depends on a document alone."""

import pytest

from deepspeed_sdp.data.split import is_heldout
from tests.data.conftest import make_documents

MANY = make_documents(2000, words=8)


def heldout(fraction):
    return {text for text in MANY if is_heldout(text, fraction)}


def test_a_larger_share_only_adds():
    assert heldout(0.05) < heldout(0.2)


def test_the_share_is_as_asked():
    assert not heldout(0.0)
    for fraction in (0.02, 0.1, 0.5):
        assert len(heldout(fraction)) / len(MANY) == pytest.approx(fraction, abs=0.035)
