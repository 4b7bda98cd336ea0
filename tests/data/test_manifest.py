"""Manifests and what else preparations left, damaged or made up: one line, and nothing is built of what they claim."""

import json
import os
import resource
import shutil
import time
from copy import deepcopy

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.cli import main
from deepspeed_sdp.data import ShardOptions, SourceSpec, StreamedSequences, load_tokenizer, open_shards, prepare_shards
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.heldout import HeldoutSequences
from deepspeed_sdp.data.manifest import checksum
from deepspeed_sdp.data.reading import read_chunks
from deepspeed_sdp.data.source import find_source
from deepspeed_sdp.errors import DataError
from tests.data.fineweb import write_jsonl


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer, documents):
    folder = tmp_path_factory.mktemp("manifest")
    tokenizer.save_pretrained(folder / "tokenizer")
    source = SourceSpec((str(write_jsonl(folder / "a.jsonl", documents)),))
    options = ShardOptions(source, str(folder / "tokenizer"), heldout_fraction=0.1, shard_tokens=1000)
    prepare_shards(folder / "shards", options, workers=1)
    return folder / "shards"


@pytest.fixture
def shards(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "shards")


def changed(shards, change):
    file = shards / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(change(manifest) or manifest))


def assert_one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def refused(shards, message=None):
    with pytest.raises(DataError, match=message) as error:
        open_shards(shards)
    assert_one_line(error.value)


def entry(manifest, name):
    return next(file for file in manifest["files"] if file["name"] == name)


def unlisted(name):
    return lambda m: m.update(files=[file for file in m["files"] if file["name"] != name])


def renamed(name):
    return lambda m: m["files"].append({**m["files"][0], "name": name})


def setting(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


CASES = {
    "shard unlisted": (unlisted("train-00001.bin"), "lists train-00001.bin not at all; its figures take 2000 bytes"),
    "index unlisted": (unlisted("heldout-documents.idx"), "lists heldout-documents.idx not at all"),
    "tokenizer file unlisted": (unlisted("tokenizer/tokenizer.json"), "does not list tokenizer/tokenizer.json"),
    "nothing listed": (setting("files", value=[]), "lists 0 files"),
    "another size": (lambda m: entry(m, "train-00000.bin").update(bytes=4), "with 4 bytes; its figures take 2000"),
    "twice": (lambda m: m["files"].append(m["files"][0]), "twice"),
    "above": (renamed("../a"), "takes names of files within the folder"),
    "absolute": (renamed("/etc/passwd"), "takes names of files within the folder"),
    "in disguise": (renamed("tokenizer/../../a"), "takes names of files within the folder"),
    "a NUL": (renamed("a\0b"), "takes names of files within the folder"),
    "missing": (renamed("gone"), "is no file within"),
    "a folder": (renamed("tokenizer"), "is no file within"),
    "more shards": (setting("splits", "train", "shards", value=10**15), "lists .* files; .* train tokens take others"),
    "more tokens": (setting("splits", "train", "tokens", value=10**15), "take others"),
    "small shards": (setting("shard_tokens", value=1), "take others"),
    "no shards": (setting("shard_tokens", value=0), "shard_tokens: got 0; input should be greater"),
    "negative": (setting("splits", "train", "tokens", value=-5), "splits.train.tokens: got -5; input should be"),
    "a fraction": (setting("splits", "train", "tokens", value=5.0), "splits.train.tokens: got 5.0; input should be a"),
    "a truth": (setting("splits", "train", "tokens", value=True), "splits.train.tokens: got true; input should be"),
    "a word": (setting("splits", "train", "tokens", value="x" * 999), "got \"xxx.*; input should be a valid integer"),
    "huge": (setting("splits", "train", "tokens", value=10**30), "splits.train.tokens"),
    "split missing": (lambda m: m["splits"].pop("heldout") and None, "splits.heldout: got nothing; it is required"),
    "no documents": (setting("splits", "train", "documents", value=0), "has 0 train documents of"),
    "wider": (setting("dtype", value="<u4"), "its figures take 4000 bytes"),
    "of objects": (setting("dtype", value="O"), "dtype: got \"O\"; input should be '<u2' or '<u4'"),
    "a vocabulary": (setting("tokenizer", "vocab_size", value=1 << 30), "does not go with its dtype"),
    "EOS outside": (setting("tokenizer", "eos_token_id", value=400), "does not go with its dtype and special tokens"),
    "another version": (setting("format", value=7), "has format 7; this version takes 1"),
    "no version": (setting("format", value=[1]), "format: got \\[1\\]"),
    "a list": (lambda m: [m], "takes a JSON object"),
    "no checksum": (lambda m: m["files"][0].update(sha256="0"), "files.0.sha256"),
    "no source": (setting("request", value={}), "request.source: got nothing"),
    "skips": (setting("skipped", value={"row": {"count": 1, "first": []}}), "skipped.row.first"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_manifest_that_is_not_true_is_refused(shards, case):
    change, message = CASES[case]
    changed(shards, change)
    refused(shards, message)


TEXTS = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "digits": '{"format": ' + "1" * 100_000 + "}",
    "not a number": '{"format": NaN}',
    "cut": '{"format": 1, "files": [',
    "empty": "",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_no_manifest_is_refused(shards, case, capsys):
    text = TEXTS[case]
    (shards / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(shards, r"manifest\.json: ")
    assert main(["data", "--inspect", str(shards)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_flipped_bit_in_the_tokenizer_is_seen(shards):
    file = shards / "tokenizer" / "tokenizer_config.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(shards, r"tokenizer_config\.json: differs from the manifest's checksum")


def test_a_file_that_was_added_to_the_tokenizer_is_seen(shards):
    (shards / "tokenizer" / "added_tokens.json").write_text("{}")
    refused(shards, "does not list tokenizer/added_tokens.json; takes the folder as it was made")


def test_links_lead_nowhere_else(shards, tmp_path):
    outside = tmp_path / "outside.bin"
    os.rename(shards / "train-00000.bin", outside)
    (shards / "train-00000.bin").symlink_to(outside)
    refused(shards, r"train-00000\.bin: is no file within")
    (shards / "train-00000.bin").unlink()
    os.rename(outside, shards / "hidden.bin")
    (shards / "train-00000.bin").symlink_to("hidden.bin")
    assert open_shards(shards).tokens("train")


def relisted(shards, name, content):
    """``name`` with another content that the manifest agrees with."""
    (shards / name).write_bytes(content)
    changed(shards, lambda m: entry(m, name).update(sha256=checksum(shards / name)))


@pytest.mark.parametrize("offsets", [[0, 50, 40], [0, -3, 60], [0, 0, 5], [5, 4, 3]])
def test_documents_that_overlap_are_refused_where_they_are_read(shards, offsets):
    name = "train-documents.idx"
    whole = np.fromfile(shards / name, "<i8")
    whole[: len(offsets)] = offsets
    relisted(shards, name, whole.tobytes())
    sequences = open_shards(shards).sequences("train", 256, "positions")
    if offsets[1] == -3:  # a search may pass over a wrong one
        positions = [item["position_ids"] for item in sequences]
        assert all(((p >= 0) & (p < 256)).all() for p in positions)
    else:
        with pytest.raises(DataError, match=r"train-documents\.idx: is not in ascending order"):
            list(sequences)


def test_ids_past_the_vocabulary_are_refused_where_they_are_read(shards):
    ids = np.fromfile(shards / "train-00001.bin", "<u2")
    ids[7] = 60_000
    relisted(shards, "train-00001.bin", ids.tobytes())
    sequences = open_shards(shards).sequences("train", 100)
    assert sequences[0]["input_ids"].shape == (100,)
    with pytest.raises(DataError, match=r"train-00001\.bin: holds the id 60000; .*--verify"):
        sequences[10]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def paths_of(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_of(inner, (*path, key))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_manifest_with_anything_anywhere_opens_or_is_refused_in_one_line(whole, data):
    manifest = json.loads((whole / "manifest.json").read_text())
    path = data.draw(st.sampled_from([path for path in paths_of(manifest) if path]))
    place = manifest = deepcopy(manifest)
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(ANY)
    else:
        del place[path[-1]]
    other = whole.parent / "fuzzed"
    if not other.exists():
        shutil.copytree(whole, other)
    (other / "manifest.json").write_text(json.dumps(manifest))
    try:
        found = open_shards(other)
    except DataError as error:
        assert_one_line(error)
        return
    for split in ("train", "heldout"):
        assert len(found.sequences(split, 8)[0]["input_ids"]) == 8
    main(["data", "--inspect", str(other)])


def test_sizes_that_are_claimed_are_not_made(shards):
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in ("more shards", "more tokens", "small shards", "a vocabulary"):
        shutil.copy(shards / "manifest.json", shards.parent / "kept.json")
        changed(shards, CASES[case][0])
        refused(shards)
        shutil.copy(shards.parent / "kept.json", shards / "manifest.json")
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KB"


def test_a_footer_that_claims_more_rows_than_there_are(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["the red cat"] * 5000}), file)

    def varint(number):  # as Thrift writes it, two bytes
        return bytes([number * 2 & 127 | 128, number * 2 >> 7])

    head, tail = file.read_bytes().rsplit(varint(5000), 1)
    file.write_bytes(head + varint(8191) + tail)
    source = find_source(SourceSpec((str(file),)), Skipped())
    with pytest.raises(DataError, match=r"row group"):
        list(read_chunks(source.files[0], source.spec, Skipped()))


@pytest.mark.parametrize(
    "change",
    [{"num_lanes": 1 << 50}, {"num_lanes": "2"}, {"lanes": None}, {"lanes": {"0": [0] * 6}}, {"lanes": {"x": [0] * 7}},
     {"lanes": {"0": [-1] * 7, "1": [0] * 7}}, {"lanes": {"0": [10**40] * 7}}],
)  # fmt: skip
def test_a_state_of_a_stream_that_is_not_true_is_refused(tmp_path, tokenizer, documents, change):
    source = SourceSpec((str(write_jsonl(tmp_path / "a.jsonl", documents)),))
    stream = StreamedSequences(
        source, tokenizer, 32, rank=0, world_size=1, micro_batch=1, global_batch=2, num_lanes=2
    )  # fmt: skip
    with pytest.raises(DataError, match="stream state: ") as error:
        stream.load_state_dict({**stream.state_dict(), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "bits", "bomb", "another shape", "overlapping", "no about"])
def test_held_out_text_that_is_damaged_is_read_anew(tmp_path, damage):
    about = {"count": 2, "seq_length": 8}
    text = HeldoutSequences(np.arange(16, dtype="<u2").reshape(2, 8), np.array([0, 5], dtype=np.int64), Skipped())
    file = tmp_path / "heldout.npz"
    text.save(file, about)
    assert HeldoutSequences.load(file, about) is not None
    parts = {"ids": text.ids, "starts": text.starts, "about": np.array(json.dumps({"identity": about, "skipped": {}}))}
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "bits":
        data = bytearray(file.read_bytes())
        data[60] ^= 255
        file.write_bytes(data)
    else:
        parts |= {
            "bomb": {"more": np.zeros(50_000_000, dtype=np.int8)},
            "another shape": {"ids": text.ids.reshape(4, 4)},
            "overlapping": {"starts": np.array([5, 5], dtype=np.int64)},
            "no about": {"about": np.array("[" * 5000)},
        }[damage]
        with file.open("wb") as out:
            np.savez_compressed(out, **parts)
    assert HeldoutSequences.load(file, about) is None


def test_a_tokenizer_with_an_id_far_away(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 1 << 31
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"--tokenizer: .* has ids up to 2147483648 for \d+ entries"):
        load_tokenizer(tmp_path)
