"""Documents out of files, whole and broken."""

import errno
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from deepspeed_sdp.data.documents import stream_documents, stream_tasks
from deepspeed_sdp.data.faults import FaultPolicy, Retry, Skipped, is_lost
from deepspeed_sdp.data.reading import Place, read_chunks
from deepspeed_sdp.data.source import SourceSpec, find_source
from deepspeed_sdp.errors import ConfigError, DataError
from tests.data.fineweb import write_jsonl, write_parquet

SKIP = FaultPolicy(on_broken_file="skip", retries=0, first_wait=0.0)


def read(*paths, faults=SKIP, **options):
    skipped = Skipped()
    source = find_source(SourceSpec(tuple(map(str, paths)), faults=faults, **options), skipped)
    return [text for text, _ in stream_documents(source, skipped)], skipped


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_documents_come_in_order_and_from_any_chunk_on(tmp_path, documents, name):
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, documents)
    assert read(path) == (documents, Skipped())
    assert read(tmp_path)[0] == read(tmp_path / "a.*")[0] == documents
    skipped = Skipped()
    source = find_source(SourceSpec((str(path),)), skipped)
    chunks = list(read_chunks(source.files[0], source.spec, skipped, chunk_rows=3))
    for start in range(0, len(chunks), 5):
        place = Place(chunks[start].group, chunks[start].number)
        assert list(read_chunks(source.files[0], source.spec, skipped, place, chunk_rows=3)) == chunks[start:]


def test_other_text_columns_and_dictionaries(tmp_path):
    column = pyarrow.array(["a cat", "a dog", "a cat"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"content": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_column="content")[0] == ["a cat", "a dog", "a cat"]
    found, skipped = read(tmp_path / "a.parquet")
    assert found == []
    assert list(skipped.counts) == ["file: no column 'text' (--text_column)"]


LINES = {
    "row: text is null": {"text": None},
    "row: text is no string": {"text": 7},
    "row: text holds half a character": {"text": "half \ud83d"},
    "row: no column 'text'": {"txt": "a"},
    "row: line is no JSON object": ["a"],
    "row: text is empty": {"text": " "},
}


def test_every_kind_of_broken_line_is_counted_with_its_place(tmp_path):
    lines = [json.dumps({"text": "first"}).encode()]
    lines += [json.dumps(row).encode() for row in LINES.values()]
    lines += [b'{"text": "cut', b'{"text": "\xff"}', b"", json.dumps({"text": "last"}).encode()]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found, skipped = read(path)
    assert found == ["first", "last"]
    expected = [*LINES, "row: line is no valid JSON", "row: line is not UTF-8"]
    assert skipped.counts == dict.fromkeys(expected, 1)
    assert skipped.places["row: line is not UTF-8"] == [f"{path}: line 9"]
    assert Skipped.from_json(json.loads(json.dumps(skipped.to_json()))).to_json() == skipped.to_json()
    with pytest.raises(DataError, match=r"a\.jsonl: line 2: text is null \(--on_broken_row skip"):
        read(path, faults=FaultPolicy(on_broken_row="stop"))


def test_broken_rows_of_parquet(tmp_path):
    good = pyarrow.array(["a cat", None, "a dog"])
    bad = pyarrow.array([b"a bird", b"\xff\xfe", b"a tree"]).view(pyarrow.string())
    table = pyarrow.table({"text": pyarrow.chunked_array([good, bad])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found, skipped = read(tmp_path / "a.parquet")
    assert found == ["a cat", "a dog", "a bird", "a tree"]
    assert skipped.counts == {"row: text is null": 1, "row: text is not UTF-8": 1}
    assert skipped.places["row: text is not UTF-8"] == [f"{tmp_path / 'a.parquet'}: row 4"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_rows_before_a_cut_are_used(tmp_path, suffix):
    draw = random.Random(0)
    texts = [f"{number} " + "".join(draw.choices("abcdefgh ", k=400)) for number in range(2000)]
    path = write_jsonl(tmp_path / f"a.jsonl.{suffix}", texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    after = write_jsonl(tmp_path / "b.jsonl", ["next file"])
    found, skipped = read(path, after)
    assert found[-1] == "next file"
    assert 700 < len(found) < 1300
    assert found[:-1] == texts[: len(found) - 1]
    assert skipped.counts == {"file: damaged or cut off in its compressed data": 1}
    with pytest.raises(DataError, match=r"cut off in its compressed data.*--on_broken_file skip"):
        read(path, faults=FaultPolicy())


def test_parquet_without_its_end_and_a_damaged_row_group(tmp_path, documents):
    cut = write_parquet(tmp_path / "a.parquet", documents)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    damaged = tmp_path / "b.parquet"
    with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(whole)) as table:
        pages = table.metadata.row_group(1).column(0)
        start = pages.dictionary_page_offset or pages.data_page_offset
    damaged.write_bytes(
        whole[:start] + b"\xff" * pages.total_compressed_size + whole[start + pages.total_compressed_size :]
    )
    found, skipped = read(cut, damaged)
    assert found == documents[:7] + documents[14:]
    assert skipped.counts == {"file: no readable parquet file": 1, "file: damaged row group": 1}
    for path in (cut, damaged):
        with pytest.raises(DataError, match=path.name):
            read(path, faults=FaultPolicy())


def test_tasks_are_all_of_the_source_and_go_on_where_one_ended(tmp_path, documents):
    write_parquet(tmp_path / "a.parquet", documents)
    write_parquet(tmp_path / "b.parquet", [f"row {n}" for n in range(10000)], rows_per_group=10000)
    write_jsonl(tmp_path / "c.jsonl", documents)
    (tmp_path / "d.jsonl.gz").write_bytes(b"no gzip")
    source = find_source(SourceSpec((str(tmp_path),), faults=SKIP), Skipped())
    tasks = list(stream_tasks(source))
    assert len(tasks) == 9 + 10 + 1 + 1
    assert tasks[-1].skipped.counts == {"file: damaged or cut off in its compressed data": 1}
    for number, task in enumerate(tasks[:-1]):
        assert list(stream_tasks(source, task.after)) == tasks[number + 1 :]


def test_unknown_sources_are_one_clear_error(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for path, said in (
        (tmp_path / "b.parquet", "does not exist"),
        (tmp_path / "a.csv", "another kind"),
        (tmp_path, "no"),
    ):
        with pytest.raises(DataError, match=said):
            read(path)
    with pytest.raises(ConfigError, match="--source: got local files with a config, 'x'"):
        SourceSpec((str(tmp_path),), config="x")
    with pytest.raises(ConfigError, match="takes it alone"):
        SourceSpec(("hub:a/b", str(tmp_path)))
    with pytest.raises(ConfigError, match="--on_broken_row: got 'ignore'"):
        FaultPolicy(on_broken_row="ignore")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        find_source(SourceSpec(("hub:HuggingFaceFW/fineweb",), config="sample-10BT"), Skipped())


def test_what_can_be_tried_again_and_for_how_long(tmp_path):
    assert is_lost(ConnectionResetError())
    assert is_lost(OSError(errno.EIO, "Input/output error"))
    assert not is_lost(OSError("Corrupt snappy compressed data."))
    assert not is_lost(FileNotFoundError(errno.ENOENT, "gone"))
    skipped = Skipped()
    calls = []

    def fail():
        calls.append(1)
        raise ConnectionResetError("reset by peer")

    with pytest.raises(DataError, match=r"x: cannot be read after 3 retries .*reset by peer"):
        Retry("x", FaultPolicy(retries=3, first_wait=0.0), skipped).call(fail)
    assert len(calls) == 4
    assert skipped.counts == {"retried: connection or read lost": 3}
