"""Text that is tokenised on the fly: the held-out part is read once, and what is skipped is told."""

import pytest

from deepspeed_sdp.data import train_tokenizer
from tests.data.conftest import make_documents
from tests.data.fineweb import write_parquet

CASE = "tests.pretraining.stream_cases:open_and_read"


@pytest.fixture
def call(tmp_path):
    texts = make_documents(300, words=40)
    write_parquet(tmp_path / "a.parquet", [None, *texts], rows_per_group=8)
    train_tokenizer(texts[:50], 320, tmp_path / "tokenizer")
    (tmp_path / "run").mkdir()
    names = {"source": "a.parquet", "tokenizer": "tokenizer", "output": "run"}
    return {"recipe": "15m", **{key: str(tmp_path / name) for key, name in names.items()}}


def test_rank_0_reads_the_heldout_text_once_for_all_and_says_what_it_skipped(ranks4, call):
    first = ranks4.run(CASE, timeout=60, **call)
    assert [rank["readings"] for rank in first] == [[4], [], [], []]
    assert [rank["ids"] for rank in first] == [first[0]["ids"]] * 4
    assert len(first[0]["ids"]) == 4
    heldout = "held-out text: row: text is null"
    assert [rank["skipped"].get(heldout) for rank in first] == [1, None, None, None]
    again = ranks4.run(CASE, timeout=60, **call)
    assert [rank["readings"] for rank in again] == [[]] * 4
    assert [rank["ids"] for rank in again] == [rank["ids"] for rank in first]
    assert again[0]["skipped"][heldout] == 1
    other = ranks4.run(CASE, timeout=60, **call, seq_length=16)
    assert [rank["readings"] for rank in other] == [[4], [], [], []]
    strict = ranks4.run(CASE, timeout=60, **call, policy={"on_broken_row": "stop"}, sequences=5)
    assert [rank["error"] for rank in strict] == [strict[0]["error"]] * 4
    assert "text is null (--on_broken_row skip passes over it)" in strict[0]["error"]
