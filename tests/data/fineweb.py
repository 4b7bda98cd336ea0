"""Files with FineWeb's columns."""

import gzip
import json

import pyarrow
import pyarrow.parquet

SCHEMA = pyarrow.schema(
    [
        ("text", pyarrow.string()), ("id", pyarrow.string()), ("dump", pyarrow.string()), ("url", pyarrow.string()),
        ("date", pyarrow.string()), ("file_path", pyarrow.string()), ("language", pyarrow.string()),
        ("language_score", pyarrow.float64()), ("token_count", pyarrow.int64()),
    ]
)  # fmt: skip


def rows_of(texts):
    return [
        {
            "text": text,
            "id": f"<urn:uuid:{number:08d}>",
            "dump": "CC-MAIN-2013-20",
            "url": f"http://example.com/{number}",
            "date": "2013-05-18T05:48:54Z",
            "file_path": "s3://commoncrawl/x.warc.gz",
            "language": "en",
            "language_score": 0.9,
            "token_count": len(str(text).split()),
        }
        for number, text in enumerate(texts)
    ]


def write_parquet(path, texts, rows_per_group=7):
    table = pyarrow.Table.from_pylist(rows_of(texts), schema=SCHEMA)
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_jsonl(path, texts):
    data = "".join(json.dumps(row) + "\n" for row in rows_of(texts)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        data = sink.getvalue().to_pybytes()
    path.write_bytes(data)
    return path
