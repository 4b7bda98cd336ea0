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
from deepspeed_sdp.checkpoint.hf_folder import HFFolder
from deepspeed_sdp.checkpoint.layout import check_cover, read_layout
from deepspeed_sdp.checkpoint.runs import Entry, cut, whole
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


LAYOUT, TENSORS = "layout-00001.json", "tensors-00001.safetensors"


def _layout(change):
    return lambda files: change(files[LAYOUT])


def _both(change):
    """Both layouts say the same: only that it is impossible tells."""

    def change_both(files):
        for rank in (0, 1):
            change(files[f"layout-{rank:05d}.json"])

    return change_both


def _run(layout, name=UP):
    """The first run of a tensor."""
    number = list(layout["tensors"]).index(name.removeprefix("master."))
    return next(run for run in layout["runs"] if run[0] == number)


def _huge(layout):
    layout["tensors"][UP.removeprefix("master.")] = [1 << 40]
    run, other = (run for run in layout["runs"] if run[0] == _run(layout)[0])
    run[1:] = 1, 0, 1 << 40, 0, 1 << 39
    other[1:] = 1, 0, 1 << 40, 1 << 39, 1 << 40
    for bucket in layout["sections"][0]["buckets"]:
        bucket[3] = 1 << 40


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
    "nested_objects": (_text(LAYOUT, '{"a":' * 200_000), LAYOUT),
    "huge_integer": (_text("meta.json", '{"global_steps": 1' + "0" * 10_000 + "}"), "meta.json"),
    "twice": (_text("meta.json", '{"a": 1, "a": 2}'), 'the key "a" stands twice'),
    "nan": (_text("meta.json", '{"full_scale": NaN}'), "got NaN"),
    "not_utf8": (_text(LAYOUT, b"\xff\xfe{}"), LAYOUT),
    "no_object": (_text(LAYOUT, "[]"), LAYOUT),
    "overlap": (_both(lambda layout: _run(layout).__setitem__(4, 1)), f"the parts of {UP} overlap"),
    "other_place": (_both(lambda layout: _run(layout).__setitem__(2, 1)), "has shape"),
    "gap": (_both(lambda layout: layout["sections"][0]["buckets"].pop()), "runs: some are in no bucket"),
    "differ": (_layout(lambda layout: layout["sections"][0]["buckets"][0].__setitem__(3, 10**6)), "overlap, or lack"),
    "other_order": (_layout(lambda layout: layout["runs"].insert(0, layout["runs"].pop(1))), "overlap, or lack"),
    "beyond": (_both(lambda layout: _run(layout).__setitem__(5, 10**9)), f"the parts of {UP.removeprefix('master.')}"),
    "huge_shape": (
        _both(lambda layout: layout["tensors"].update({UP[7:]: [10**15, 16]})),
        f"the parts of {UP} overlap",
    ),
    "too_large": (_both(_huge), "its layout says "),
    "negative": (_layout(lambda layout: _run(layout).__setitem__(2, -1)), "greater than or equal to 0"),
    "text_size": (_layout(lambda layout: _run(layout).__setitem__(2, "4")), "valid integer"),
    "no_owner": (_layout(lambda layout: layout["owners"][0][0].__setitem__(0, 7)), "there is no such rank"),
    "owner_twice": (_layout(lambda layout: layout["owners"][0][0].__setitem__(0, 1)), "a rank stands twice"),
    "few_owners": (_both(lambda layout: layout.update(owners=[[[0], [1]]])), "1 shards of"),
    "other_dtype": (_set(LAYOUT, "sections", 0, "kinds", "master", "bfloat16"), "overlap, or lack"),
    "both_dtypes": (_both(lambda layout: layout["sections"][0]["kinds"].update(master="bfloat16")), "the layout says"),
    "no_dtype": (_set(LAYOUT, "sections", 0, "kinds", "master", "load"), "kinds"),
    "unknown_key": (_set(LAYOUT, "also", 1), "also"),
    "less": (_both(lambda layout: layout["sections"].clear()), "runs: some are in no bucket"),
    "bad_name": (_both(lambda layout: layout["tensors"].update({"../x": [2]})), "pattern"),
    "workers": (_set("meta.json", "workers", [0]), "1 workers"),
    "other_workers": (_set("meta.json", "workers", [0, 2]), "lists, as no job does, layout-00001.json"),
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
    "tensors": (lambda files: files.update({TENSORS: b"\xff" * 64}), TENSORS),
    "header": (
        lambda files: files.update({TENSORS: (1 << 40).to_bytes(8, "little") + b"{}" + b" " * 60_000}),
        TENSORS,
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


@pytest.mark.parametrize("name", [LAYOUT, "meta.json", "plan.json", "state.pt"])
def test_a_manifest_lists_all_that_is_used(alone, tmp_path, name):
    checkpoint = write_tiny(tmp_path)
    change_manifest(checkpoint, lambda body: body["files"].pop(name))
    messages = refusal(tmp_path, tmp_path)
    assert len(messages) == 5
    assert all(f"does not list {name}" in message for message in messages)


@pytest.mark.parametrize("name", ["tensors-00001.safetensors", "rank-00001.pt"])
def test_a_manifest_of_a_rank_lists_all_that_is_used_of_it(alone, tmp_path, name):
    """What it does not list is not read: here copies are, and where there are none it is refused."""
    checkpoint = write_tiny(tmp_path)
    change_manifest(checkpoint, lambda body: body["files"].pop(name), "rank-00001.json")
    data = bytearray((checkpoint / TENSORS).read_bytes())
    data[-5] ^= 4
    (checkpoint / TENSORS).write_bytes(data)
    assert refusal(tmp_path, tmp_path) == []
    assert all(torch.equal(value, tensors()[name]) for name, value in load_tiny(tmp_path).items())
    without = write_tiny(tmp_path, change=_both(lambda layout: layout["owners"][0].pop()))
    change_manifest(without, lambda body: body["files"].pop(name), "rank-00001.json")
    messages = refusal(tmp_path, tmp_path)
    assert len(messages) == 5
    assert all(f"rank-00001.json does not list {name}, and no other file" in message for message in messages)


def test_a_manifest_of_a_rank_of_another_save_is_not_believed(alone, tmp_path):
    other = (write_tiny(tmp_path, "other") / "rank-00001.json").read_text()
    (write_tiny(tmp_path) / "rank-00001.json").write_text(other)
    assert "not of this checkpoint" in summarize(tmp_path / "t", verify=True)["damage"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}}),
        lambda body: body["files"]["meta.json"].pop("bytes"),
        lambda body: body["files"]["meta.json"].update(bytes=1e300),
        lambda body: body.update(format=1),
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
def test_a_changed_layout_covers_every_element_once_or_is_refused(tmp_path, data):
    changed = mutate(data, content()[LAYOUT])
    (tmp_path / LAYOUT).write_text(json.dumps(changed))
    found, message = outcome_of(lambda: read_layout(tmp_path, 1))
    assert "\n" not in message
    shapes, message = outcome_of(lambda: check_cover([found])) if found else ({}, message)
    assert "\n" not in message
    seen = {logical: torch.zeros(shape) for logical, shape in (shapes or {}).items()}
    for section in found.sections if shapes else ():
        for kind, run in ((k, run) for bucket in section.buckets for run in bucket.runs for k in section.kinds):
            matrix = seen[f"{kind}.{run.name}"].view(run.rows, -1)
            for top, bottom, left, right in run.rectangles():
                matrix[top:bottom, left:right] += 1
    assert all((count == 1).all() for count in seen.values())


def check_any_change(tmp_path, data):
    name = data.draw(st.sampled_from([LAYOUT, "meta.json"]))
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
    save_file({"a": torch.ones(2), "b": torch.arange(6.0).view(3, 2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(CheckpointError, match="holds a twice"):
        HFFolder(tmp_path)
    for text in ('{"weight_map": {"a": "../x"}}', '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            HFFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    runs = (whole("a", (2,)), *cut([whole("b", (3, 2))], 3, 6))
    values = torch.empty(5)
    HFFolder(tmp_path).fill([Entry("master", runs, values)])
    assert values.tolist() == [0, 0, 3, 4, 5]
