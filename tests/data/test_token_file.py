"""What datatrove has tokenised is read as text is: dealt to lanes, held out by its text, mixed, and made shards of."""

import struct

import numpy as np
import pytest

from deepspeed_sdp.data import FaultPolicy, ShardOptions, SourceSpec, StreamedSequences, open_shards, prepare_shards
from deepspeed_sdp.data.encoding import DocumentEncoder
from deepspeed_sdp.errors import DataError
from tests.data.conftest import make_documents
from tests.data.fineweb import write_jsonl


def write_tokens(path, rows, width=2, metadata=True):
    """As datatrove's ``TokenizedFile`` does: struct's H or I, ends as Q, and three lines of text."""
    path.write_bytes(b"".join(struct.pack(f"<{len(row)}{'H' if width == 2 else 'I'}", *row) for row in rows))
    ends = np.cumsum([len(row) for row in rows]).tolist()
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        path.with_name(f"{path.name}.metadata").write_text(f"some/tokenizer|{width}\n{ends[-1]}\n1.2 kT")
    return path


@pytest.fixture
def texts():
    return make_documents(90, seed=8, words=30)


@pytest.fixture
def rows(texts, tokenizer):
    return [row.tolist() for row in DocumentEncoder(tokenizer)(texts)]


def open_stream(path, tokenizer, **options):
    shape = {"rank": 0, "world_size": 1, "micro_batch": 4, "global_batch": 4, "num_lanes": 4}
    spec = SourceSpec((str(path),), faults=options.pop("faults", FaultPolicy()))
    return StreamedSequences(spec, tokenizer, 32, **shape, heldout_fraction=0.1, chunk_rows=4, **options)


def take(stream, count):
    batches = [next(stream)["input_ids"].tolist() for _ in range(count)]
    state = stream.state_dict()
    stream.close()
    return batches, state


@pytest.mark.parametrize("width", [2, 4])
def test_tokens_are_trained_on_as_their_text_is_and_gone_on_with(tmp_path, texts, rows, tokenizer, width):
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    # Without an end, as some tokenise; and without metadata.
    rows = [row[:-1] if number % 2 else row for number, row in enumerate(rows)]
    tokens = write_tokens(tmp_path / "a.ds", rows, width, metadata=width == 4)
    wanted, _ = take(open_stream(lines, tokenizer), 60)
    assert take(open_stream(tokens, tokenizer), 60)[0] == wanted
    begun, state = take(open_stream(tokens, tokenizer), 25)
    again = open_stream(tokens, tokenizer)
    again.load_state_dict(state)
    assert begun + take(again, 35)[0] == wanted
    heldout = [open_stream(path, tokenizer).heldout(3) for path in (lines, tokens)]
    assert heldout[0].ids.tolist() == heldout[1].ids.tolist()


def test_shards_of_tokens_are_those_of_their_text(tmp_path, texts, rows, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sources = [write_jsonl(tmp_path / "a.jsonl", texts), write_tokens(tmp_path / "a.ds", rows)]
    made = []
    for number, source in enumerate(sources):
        options = ShardOptions(SourceSpec((str(source),)), str(tmp_path / "tokenizer"), heldout_fraction=0.1)
        made.append(prepare_shards(tmp_path / str(number), options, workers=1 + number))
    assert made[0]["files"] == made[1]["files"]
    assert made[0]["splits"] == made[1]["splits"]
    assert len(open_shards(tmp_path / "1").sequences("train", 32)) > 1
    with pytest.raises(DataError, match="--train_tokenizer: the source is tokenised"):
        prepare_shards(tmp_path / "2", ShardOptions(SourceSpec((str(sources[1]),)), train_tokenizer=300), workers=1)


def test_ids_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    path = write_tokens(tmp_path / "a.ds", [[5, 9000]] * 40)
    with pytest.raises(DataError, match=r"--tokenizer: got one of \d+ ids, and documents .* hold 9000"):
        take(open_stream(path, tokenizer), 1)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def disorder(path):
    ends = np.fromfile(f"{path}.index", "<u8")
    ends[:2] = ends[1::-1]
    ends.tofile(f"{path}.index")


DAMAGE = {
    "does not go with": cut,
    "its index has 3 bytes": lambda path: path.with_name("a.ds.index").write_bytes(b"abc"),
    "its index is not in ascending order": disorder,
    "its metadata say 4 bytes per id": lambda path: path.with_name("a.ds.metadata").write_text("x|4\n12\n"),
    "No such file": lambda path: path.with_name("a.ds.index").unlink(),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_what_does_not_fit_together_is_a_broken_file(tmp_path, texts, rows, tokenizer, said):
    DAMAGE[said](write_tokens(tmp_path / "a.ds", rows))
    write_jsonl(tmp_path / "b.jsonl", texts)
    with pytest.raises(DataError, match=rf"a\.ds: .*{said}.*--on_broken_file skip"):
        take(open_stream(tmp_path, tokenizer), 5)
    lenient = open_stream(tmp_path, tokenizer, faults=FaultPolicy(on_broken_file="skip"))
    take(lenient, 30)
    assert any(reason.startswith("file:") for reason in lenient.skipped.counts)


def test_empty_documents_and_files_are_passed_over(tmp_path, rows, tokenizer):
    write_tokens(tmp_path / "a.ds", [*rows[:20], [], *rows[20:]])
    for name in ("b.ds", "b.ds.index"):
        (tmp_path / name).touch()
    stream = open_stream(tmp_path, tokenizer)
    take(stream, 100)
    assert set(stream.skipped.counts) == {"row: text is empty"}
