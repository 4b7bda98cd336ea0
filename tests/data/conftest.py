import random

import pytest

from deepspeed_sdp.data import train_tokenizer

VOCABULARY = "the a red blue cat dog bird walks runs sees under over house tree river and then slowly"


def make_documents(count, seed=0, words=80):
    draw = random.Random(seed)
    vocabulary = VOCABULARY.split()
    return [" ".join(draw.choice(vocabulary) for _ in range(words)) + f" {number}." for number in range(count)]


@pytest.fixture(scope="session")
def documents():
    return make_documents(60)


@pytest.fixture(scope="session")
def tokenizer(documents, tmp_path_factory):
    return train_tokenizer(documents, 320, tmp_path_factory.mktemp("tokenizer") / "saved")
