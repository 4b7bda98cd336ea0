"""Files of a checkpoint are input: whatever they say, it is loaded as it was written or refused in one line."""

import copy
import json
import tracemalloc

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deepspeed_sdp.checkpoint.export import export
from deepspeed_sdp.checkpoint.hf_folder import HFFolderReader
from deepspeed_sdp.checkpoint.index import read_index
from deepspeed_sdp.checkpoint.summary import summarize
from deepspeed_sdp.checkpoint.universal_export import export_universal
from deepspeed_sdp.errors import CheckpointError, SDPError
from tests.support.tiny_checkpoint import change_manifest, content, load_tiny, tensors, write_tiny

UP = "master.model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def alone():
    """A job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refusal(folder, tmp_path):
    """What every reader says, in one line each; those that do not refuse it must read what was written."""
    checkpoint = folder / "t"
    reads = (
        lambda: load_tiny(folder),
        lambda: export(checkpoint, tmp_path / "hf"),
        lambda: export(checkpoint, tmp_path / "small", subnetwork=1),
        lambda: export_universal(checkpoint, tmp_path / "universal"),
        lambda: summarize(checkpoint, verify=True),
    )
    messages = [message for _, message in map(outcome_of, reads) if message]
    assert not any("\n" in message for message in messages)
    return messages


def outcome_of(work):
    """What it returns, or the message of its refusal."""
    try:
        return work(), ""
    except SDPError as error:
        return None, str(error)


def test_a_whole_one_is_read_by_all(alone, tmp_path):
    write_tiny(tmp_path)
    assert refusal(tmp_path, tmp_path) == []
    assert all(torch.equal(value, tensors()[name]) for name, value in load_tiny(tmp_path).items())


def _index(change):
    return lambda files: change(files["index.json"])


def _overlap(index):
    # As many elements as before: the second part again at the first one's place, and a gap.
    chunks = index[UP]["chunks"]
    chunks[1]["offsets"] = chunks[0]["offsets"]


def _text(name, text):
    return lambda files: files.update({name: text})


def _set(name, *path):
    *parents, key, value = path

    def change(files):
        found = files[name]
        for parent in parents:
            found = found[parent]
        found[key] = value

    return change


CHANGES = {
    "nested": (_text("meta.json", "[" * 200_000), "meta.json"),
    "nested_objects": (_text("index.json", '{"a":' * 200_000), "index.json"),
    "huge_integer": (_text("meta.json", '{"global_steps": 1' + "0" * 10_000 + "}"), "meta.json"),
    "twice": (_text("meta.json", '{"a": 1, "a": 2}'), 'the key "a" stands twice'),
    "nan": (_text("meta.json", '{"full_scale": NaN}'), "got NaN"),
    "not_utf8": (_text("index.json", b"\xff\xfe{}"), "index.json"),
    "no_object": (_text("index.json", "[]"), "index.json"),
    "overlap": (_index(_overlap), f"the parts of {UP} overlap"),
    "gap": (_index(lambda index: index[UP]["chunks"].pop()), f"the parts of {UP} overlap, or lack"),
    "beyond": (_set("index.json", UP, "shape", [4, 16]), f"the parts of {UP}"),
    "huge_shape": (_set("index.json", UP, "shape", [10**15, 16]), f"the parts of {UP}"),
    "too_large": (
        _index(
            lambda i: i[UP].update(shape=[1 << 40], chunks=[{**i[UP]["chunks"][0], "offsets": [0], "sizes": [1 << 40]}])
        ),
        "has 4398046",
    ),
    "negative": (_set("index.json", UP, "chunks", 0, "offsets", [-1, 0]), "greater than or equal to 0"),
    "text_size": (_set("index.json", UP, "chunks", 0, "sizes", ["4", 16]), "valid integer"),
    "other_folder": (_set("index.json", UP, "chunks", 0, "file", "../t/tensors-00000-000.safetensors"), "pattern"),
    "other_key": (_set("index.json", UP, "chunks", 0, "key", "nothing"), "cannot read"),
    "other_dtype": (_set("index.json", UP, "dtype", "bfloat16"), "torch.float32"),
    "no_dtype": (_set("index.json", UP, "dtype", "load"), "dtype"),
    "unknown_key": (_set("index.json", UP, "also", 1), "also"),
    "less": (_index(lambda index: index.pop(UP)), UP.removeprefix("master.")),
    "no_moments": (_set("meta.json", "optimizer_state", []), "of the optimizer; meta.json says none"),
    "layers": (_set("meta.json", "model_config", "num_hidden_layers", 10**9), "num_hidden_layers"),
    "another_model": (_set("meta.json", "model_config", "intermediate_size", 12), "the model in meta.json takes"),
    "no_model": (_set("meta.json", "model_config", "model_type", "nothing"), "model_config"),
    "no_type": (_set("meta.json", "model_config", {}), "model_config"),
    "class": (_set("meta.json", "model_class", "a/../b"), "model_class"),
    "masking": (_set("meta.json", "subnetwork_data_parallel", "masking", []), "masking"),
    "dtype": (_set("meta.json", "dtype", "storage"), "dtype"),
    "no_steps": (lambda files: files["meta.json"].pop("global_steps"), "global_steps: got nothing"),
    "bool_steps": (_set("meta.json", "global_steps", True), "global_steps"),
    "plan": (_set("plan.json", "spaces", []), None),
    "plan_text": (_text("plan.json", "no"), "plan.json"),
    "state": (_set("state.pt", "optimizer_groups", 3), "state.pt"),
    "rank_state": (lambda files: files.update({"rank-00000.pt": {"x": 1}}), "rank-00000.pt"),
    "no_ranks": (lambda files: files.pop("rank-00001.pt"), "does not list rank-00001.pt"),
    "tensors": (lambda files: files.update({"tensors-00001-000.safetensors": b"\xff" * 64}), "tensors-00001-000"),
    "header": (
        lambda files: files.update(
            {"tensors-00001-000.safetensors": (1 << 40).to_bytes(8, "little") + b"{}" + b" " * 60_000}
        ),
        "tensors-00001-000",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_job_writes_is_refused_in_one_line(alone, tmp_path, change):
    change, expected = CHANGES[change]
    write_tiny(tmp_path, change=change)
    tracemalloc.start()
    messages = refusal(tmp_path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert messages
    assert expected is None or any(expected in message for message in messages), messages
    assert peak < 100e6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["index.json", "meta.json", "plan.json", "state.pt", "rank-00001.pt"])
def test_a_manifest_lists_all_that_is_used(alone, tmp_path, name):
    checkpoint = write_tiny(tmp_path)
    change_manifest(checkpoint, lambda body: body["files"].pop(name))
    messages = refusal(tmp_path, tmp_path)
    assert len(messages) == 5
    assert all(f"does not list {name}" in message for message in messages)


def test_a_flipped_bit_in_a_file_that_the_manifest_does_not_list_is_not_loaded(alone, tmp_path):
    checkpoint = write_tiny(tmp_path)
    name = "tensors-00001-000.safetensors"
    change_manifest(checkpoint, lambda body: body["files"].pop(name))
    data = bytearray((checkpoint / name).read_bytes())
    data[-5] ^= 4
    (checkpoint / name).write_bytes(data)
    messages = refusal(tmp_path, tmp_path)
    assert len(messages) == 5
    assert all(f"bytes in {name}, which is not in the manifest" in message for message in messages)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}}),
        lambda body: body["files"]["meta.json"].pop("bytes"),
        lambda body: body["files"]["meta.json"].update(bytes=1e300),
        lambda body: body.update(format=2),
        lambda body: body.update(files=[]),
    ],
    ids=["path", "no_bytes", "float", "format", "list"],
)
def test_a_manifest_of_another_form_is_refused(alone, tmp_path, change):
    change_manifest(write_tiny(tmp_path), change)
    messages = refusal(tmp_path, tmp_path)
    assert len(messages) == 5
    assert all("manifest.json: " in message for message in messages)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.sampled_from([0, 1, -1, 2**31, 2**63, "..", "/", "float32", [[]] * 3]),
)  # fmt: skip


def places(value, path=()):
    """Every place in JSON data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate(data, value):
    """One place of JSON data removed, doubled, or something else."""
    *parents, key = data.draw(st.sampled_from(sorted((p for p in places(value) if p), key=str)))
    value = copy.deepcopy(value)
    found = value
    for parent in parents:
        found = found[parent]
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "remove":
        del found[key]
    elif how == "replace" or isinstance(found, dict):
        found[key if how == "replace" else data.draw(st.text(max_size=8))] = data.draw(ODD)
    else:
        found.append(copy.deepcopy(found[key]))
    return value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_index_is_read_as_it_was_or_refused(tmp_path, data):
    changed = mutate(data, content()["index.json"])
    (tmp_path / "index.json").write_text(json.dumps(changed))
    found, message = outcome_of(lambda: read_index(tmp_path))
    assert "\n" not in message
    for name, tensor in (found or {}).items():
        seen = torch.zeros(tensor.size)
        for chunk in tensor.chunks:
            seen[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert (seen == 1).all(), name


def check_any_change(tmp_path, data):
    name = data.draw(st.sampled_from(["index.json", "meta.json"]))
    changed = mutate(data, content()[name])
    write_tiny(tmp_path, change=lambda files: files.update({name: json.dumps(changed)}))
    loaded, message = outcome_of(lambda: load_tiny(tmp_path))
    assert "\n" not in message
    assert all(torch.equal(value, tensors()[key]) for key, value in (loaded or {}).items())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_checkpoint_is_loaded_as_it_was_or_refused(alone, tmp_path, data):
    check_any_change(tmp_path, data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_changed_checkpoints_are_loaded_as_they_were_or_refused(alone, tmp_path, data):
    check_any_change(tmp_path, data)


def test_a_huggingface_folder_is_read_as_from_pretrained_reads_it(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(CheckpointError, match="holds a twice"):
        HFFolderReader(tmp_path).read_metadata()
    for text in ('{"weight_map": {"a": "../x"}}', '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            HFFolderReader(tmp_path).read_metadata()
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    reader = HFFolderReader(tmp_path)
    reader.read_metadata()
    assert {i.fqn: place.file for i, place in reader._places.items() if i.fqn.startswith("master")} == {
        "master.a": "one.safetensors",
        "master.b": "two.safetensors",
    }
