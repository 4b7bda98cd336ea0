"""On the fly: the same order over any ranks, and from any step on."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspeed_sdp.data import FaultPolicy, SourceSpec, StreamedSequences, lanes_for, merge_states, sequences_seen
from deepspeed_sdp.data.heldout import HeldoutSequences
from deepspeed_sdp.data.mixture import Mixture
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.errors import ConfigError, DataError, OutputError
from tests.data.conftest import make_documents
from tests.data.fineweb import write_jsonl, write_parquet

LENGTH = 32


@pytest.fixture(scope="module")
def texts():
    return make_documents(120, seed=5, words=40)


@pytest.fixture(scope="module")
def spec(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("stream")
    write_parquet(folder / "a.parquet", texts[:50], rows_per_group=4)
    write_jsonl(folder / "b.jsonl.gz", texts[50:80])
    write_parquet(folder / "c.parquet", texts[80:], rows_per_group=40)
    return SourceSpec((str(folder),))


@pytest.fixture(scope="module")
def stream(spec, tokenizer):
    def make(rank=0, world=1, micro=4, lanes=4, batch=8, **options):
        options = {"heldout_fraction": 0.1, "chunk_rows": 4, "prefetch": 2, **options}
        return StreamedSequences(
            options.pop("spec", spec), tokenizer, LENGTH,
            rank=rank, world_size=world, micro_batch=micro, global_batch=batch, num_lanes=lanes, **options,
        )  # fmt: skip

    return make


def steps(streams, count):
    """Global batches as sorted lists of sequences."""
    batches = []
    for _ in range(count):
        rows = []
        for one in streams:
            for _ in range(one.global_batch // one.world_size // one.micro_batch):
                rows += next(one)["input_ids"].tolist()
        batches.append(sorted(rows))
    return batches


def ranks(stream, world, micro, state=None, **options):
    streams = [stream(rank, world, micro, **options) for rank in range(world)]
    for one in streams if state else ():
        one.load_state_dict(state)
    return streams


def close(streams):
    state = merge_states([one.state_dict() for one in streams])
    for one in streams:
        one.close()
    return json.loads(json.dumps(state))


SHAPES = [(1, 1), (1, 4), (1, 8), (2, 1), (2, 2), (4, 1), (4, 2)]


@pytest.fixture(scope="module")
def reference(stream):
    """Into the second epoch."""
    streams = [stream()]
    found = steps(streams, 60)
    assert {lane[0] for lane in close(streams)["lanes"].values()} >= {1}
    return found


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sampled_from(SHAPES), second=st.sampled_from(SHAPES), done=st.integers(0, 50))
def test_global_batches_are_the_same_over_any_ranks_also_after_going_on(stream, reference, first, second, done):
    streams = ranks(stream, *first)
    assert steps(streams, done) == reference[:done]
    resumed = ranks(stream, *second, state=close(streams))
    assert steps(resumed, 10) == reference[done : done + 10]
    close(resumed)


def test_an_epoch_is_every_training_document_once_and_the_next_has_another_order(stream, texts, tokenizer):
    streams = ranks(stream, 2, 1)
    seen = {lane: [] for lane in range(4)}
    epochs = [{}, {}]
    for one in streams:
        (reader,) = one._readers
        for lane in range(one.rank, 4, 2):
            for position, ids in reader._documents(lane, *one._positions[lane]):
                if position.epoch == 2:
                    break
                epochs[position.epoch].setdefault(lane, []).append(tokenizer.decode(ids[:-1]))
            seen[lane] = epochs[0][lane]
    wanted = sorted(text for text in texts if not is_heldout(text, 0.1))
    for epoch in epochs:
        assert sorted(text for rows in epoch.values() for text in rows) == wanted
    assert all(epochs[0][lane] != epochs[1][lane] for lane in range(4))
    assert all(sorted(epochs[0][lane]) == sorted(epochs[1][lane]) for lane in range(4))


def test_the_seed_is_the_order(stream, reference):
    other = [stream(seed=1)]
    assert steps(other, 3) != reference[:3]
    close(other)


def test_sequences_are_documents_one_after_another(stream, texts, tokenizer):
    one = stream(lanes=1, batch=4, reset="attention")
    batch = next(one)
    one.close()
    assert batch["input_ids"].shape == batch["position_ids"].shape == (4, LENGTH)
    text = tokenizer.decode(batch["input_ids"].flatten())
    documents = text.split(tokenizer.eos_token)
    assert len(documents) > 1
    assert set(documents[:-1]) <= set(texts)
    begins = (batch["labels"] == -100).sum()
    assert begins == len(documents) - (documents[-1] == "")


def test_heldout_documents_are_another_part(stream, texts, tokenizer):
    one = stream()
    found = one.heldout(3)
    text = tokenizer.decode(found.ids.flatten())
    assert "".join(t + tokenizer.eos_token for t in texts if is_heldout(t, 0.1)).startswith(text)
    rows = found.examples("attention")
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == found.ids.flatten().tolist()
    begins = [n for n, label in enumerate(torch.cat([row["labels"] for row in rows]).tolist()) if label == -100]
    assert begins == [start for start in found.starts.tolist() if start < found.ids.size]
    with pytest.raises(DataError, match=r"--heldout_fraction: got 0\.1, which holds out"):
        one.heldout(10_000)


def test_heldout_sequences_are_kept_whole_and_read_anew_where_they_differ(stream, tmp_path, texts):
    write_parquet(tmp_path / "a.parquet", [None, *texts])
    one = stream(spec=SourceSpec((str(tmp_path / "a.parquet"),)))
    found, path, identity = one.heldout(3), tmp_path / "heldout.npz", one.heldout_identity(3)
    assert HeldoutSequences.load(path, identity) is None
    found.save(path, identity)
    again = HeldoutSequences.load(path, identity)
    assert again.ids.tolist() == found.ids.tolist()
    assert again.starts.tolist() == found.starts.tolist()
    assert again.skipped.counts == {"row: text is null": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.parquet", "heldout.npz"]
    others = [stream(heldout_fraction=0.2).heldout_identity(3), one.heldout_identity(4), stream().heldout_identity(3)]
    assert all(HeldoutSequences.load(path, other) is None for other in others)
    path.write_bytes(path.read_bytes()[:200])
    assert HeldoutSequences.load(path, identity) is None
    with pytest.raises(OutputError, match="cannot be written"):
        found.save(tmp_path / "missing" / "heldout.npz", identity)


def test_faults_reach_whoever_takes_the_batch(stream, tmp_path, texts):
    write_parquet(tmp_path / "a.parquet", [*texts[:20], None, *texts[20:40]], rows_per_group=4)
    cut = write_jsonl(tmp_path / "b.jsonl.gz", texts)
    cut.write_bytes(cut.read_bytes()[:1000])
    strict = stream(spec=SourceSpec((str(tmp_path),)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.jsonl\.gz: damaged or cut off"):
            steps([strict], 100)
    strict.close()
    lenient = stream(spec=SourceSpec((str(tmp_path),), faults=FaultPolicy(on_broken_file="skip")))
    steps([lenient], 20)
    lenient.close()
    assert lenient.skipped.counts["row: text is null"] >= 1
    assert lenient.skipped.counts["file: damaged or cut off in its compressed data"] >= 1


def test_states_that_do_not_fit_are_refused(stream):
    states = [one.state_dict() for one in ranks(stream, 2, 1)]
    merged = merge_states(states)
    with pytest.raises(DataError, match="has 2 of 4 lanes"):
        stream().load_state_dict(states[0])
    with pytest.raises(DataError, match="another seed, heldout_fraction"):
        stream(seed=4, heldout_fraction=0.2).load_state_dict(merged)
    with pytest.raises(DataError, match="two ranks hold the same lane"):
        merge_states([states[0], states[0]])
    with pytest.raises(DataError, match="different streams"):
        merge_states([states[0], stream(seed=4).state_dict()])
    with pytest.raises(ConfigError, match=r"--num_lanes: got 4; .* of the 3 ranks"):
        stream(0, 3, 1, lanes=6, batch=6).load_state_dict(merged)
    with pytest.raises(ConfigError, match="global_batch: got 8; takes a multiple of 3 ranks"):
        stream(0, 3, 1)
    with pytest.raises(DataError, match=r"--num_lanes: got 64, of which lane \d+ finds no document"):
        steps([stream(lanes=64, batch=64)], 1)


def test_lanes_divide_the_batch_and_are_dealt_to_all_ranks():
    assert lanes_for(512, 4) == 64
    assert lanes_for(48, 4) == 48
    assert lanes_for(96, 96) == 96
    assert lanes_for(200, 8) == 40
    with pytest.raises(ConfigError, match="global_batch: got 10"):
        lanes_for(10, 4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, spec):
    """Two sources, of which the smaller makes up three quarters."""
    texts = [f"{number} {'Q' * 50}" for number in range(80)]
    path = write_parquet(tmp_path_factory.mktemp("other") / "a.parquet", texts, rows_per_group=4)
    return [replace(spec, weight=0.5), SourceSpec((str(path),), weight=1.5)]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sampled_from(SHAPES), second=st.sampled_from(SHAPES), done=st.integers(0, 25))
def test_a_mixture_is_the_same_over_any_ranks_and_goes_on_at_the_exact_sequence(stream, mixed, first, second, done):
    alone = ranks(stream, 1, 8, spec=mixed)
    reference = steps(alone, done + 8)
    close(alone)
    streams = ranks(stream, *first, spec=mixed)
    assert steps(streams, done) == reference[:done]
    state = close(streams)
    resumed = ranks(stream, *second, state=state, spec=mixed)
    assert steps(resumed, 8) == reference[done:]
    seen = sequences_seen(close(resumed))
    assert sum(seen) == 8 * (done + 8)
    assert seen[1] == pytest.approx(0.75 * sum(seen), abs=3)


def test_a_mixture_holds_the_share_of_each_source_and_holds_out_of_each(stream, mixed, tokenizer):
    one = stream(spec=mixed)
    rows = [row for batch in steps([one], 25) for row in batch]
    state = close([one])
    is_other = ["Q" in tokenizer.decode(row) for row in rows]
    assert sequences_seen(state) == [is_other.count(False), is_other.count(True)]
    heldout = one.heldout(8)
    assert ["Q" in tokenizer.decode(row) for row in heldout.ids] == [False] * 2 + [True] * 6
    texts = tokenizer.decode(heldout.ids[2:].flatten()).split(tokenizer.eos_token)
    assert all(is_heldout(text, 0.1) for text in texts[:-1])
    rows = heldout.examples("attention")
    assert [row["input_ids"].tolist() for row in rows] == heldout.ids.tolist()
    assert rows[2]["labels"][0] == -100, "documents of the other source begin with its first sequence"
    with pytest.raises(DataError, match="another source"):
        one.load_state_dict(stream(spec=mixed[::-1]).state_dict())
    with pytest.raises(DataError, match="takes 7 numbers for each source"):
        one.load_state_dict(state | {"lanes": {lane: numbers[:7] for lane, numbers in state["lanes"].items()}})
    with pytest.raises(ConfigError, match="weight: got -1"):
        stream(spec=[mixed[0], replace(mixed[1], weight=-1)])


def test_samples_of_a_mixture_are_spread_evenly():
    mixture = Mixture([1, 2, 7], seed=3)
    assert Mixture([10, 20, 70], seed=3).counts(500) == mixture.counts(500)
    assert mixture.counts(10_000) == pytest.approx([1000, 2000, 7000], abs=5)
    picks = [mixture.of(sample) for sample in range(2000)]
    assert [Mixture([1, 2, 7], seed=4).of(sample) for sample in range(2000)] != picks
    for first in range(0, 1900, 100):
        assert [picks[first : first + 100].count(n) for n in range(3)] == pytest.approx([10, 20, 70], abs=4)


@pytest.mark.slow
def test_ranks_gather_one_state_that_another_number_goes_on_from(ranks4, tokenizer, tmp_path, texts):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_parquet(tmp_path / "a.parquet", texts, rows_per_group=4)
    call = {"folder": str(tmp_path / "a.parquet"), "tokenizer": str(tmp_path / "tokenizer")}
    case = "tests.data.stream_cases:stream"
    first = ranks4.run(case, timeout=60, **call)
    states = [state for _, state in first]
    assert states == [states[0]] * 4
    assert [position[-1] for position in states[0]["lanes"].values()] == [4] * 4
    second = ranks4.run(case, timeout=60, **call, state=states[0], micro=1)
    one = StreamedSequences(
        SourceSpec((call["folder"],)), tokenizer, 16,
        rank=0, world_size=1, micro_batch=8, global_batch=8, num_lanes=4, heldout_fraction=0.0, chunk_rows=4,
    )  # fmt: skip
    alone = [next(one)["input_ids"].tolist() for _ in range(4)]
    one.close()
    for part, batches in ((first, alone[:2]), (second, alone[2:])):
        found = [row for rows, _ in part for batch in rows for row in batch]
        assert sorted(found) == sorted(row for batch in batches for row in batch)
