"""Checkpoints: the same job goes on to the bit, and any layout goes to any other."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspeed_sdp.checkpoint import LOCK, FolderLocks, parameter_of
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.export import export
from deepspeed_sdp.checkpoint.recovery import usable
from deepspeed_sdp.checkpoint.summary import locate
from deepspeed_sdp.cli import main
from tests.engine.cases import build_model
from tests.support.compare import assert_owners_equal
from tests.support.ranks import ROOT
from tests.support.tiny_checkpoint import change_manifest

CASES = "tests.engine.checkpoint_cases"
HALF = {"coverage": 0.5}
LAYERS = {"coverage": 0.5, "granularity": "layer"}
BACKWARD = {"coverage": 0.5, "masking": "backward"}
BIASES = {"attention_bias": True, "mlp_bias": True}

LAYOUTS = {
    "half-0": (HALF, {"stage": 0}),
    "half-1": (HALF, {"stage": 1, "bucket": 4000}),
    "half-2-owner_sets": (
        {**HALF, "comm": {"transport": "owner_sets"}},
        {"stage": 2, "bucket": 4000},
    ),
    "half-3": (HALF, {"stage": 3, "bucket": 4000}),
    "three_quarters-1": ({"coverage": 0.75}, {"stage": 1}),
    "quarter-2": ({"coverage": 0.25}, {"stage": 2}),
    "layers-1": (LAYERS, {"stage": 1}),
    "layers-3": (LAYERS, {"stage": 3}),
    "branches-0": ({**LAYERS, "granularity": "branch"}, {"stage": 0}),
    "backward-0": (BACKWARD, {"stage": 0}),
    "backward-1": (
        {**BACKWARD, "backward": {"overlap_refresh": True}},
        {"stage": 1, "bucket": 4000},
    ),
    "backward-layers-2": ({**LAYERS, "masking": "backward"}, {"stage": 2}),
    "replicas-1": ({"num_subnetworks": 2, "coverage": 0.5}, {"stage": 1}),
    "dense-1": ({"coverage": 1.0}, {"stage": 1}),
    "dense-3": ({"coverage": 1.0}, {"stage": 3}),
}


# Of the files that exist once, sorted, a rank compares every fourth with the manifest.
VERIFIED = [[f"layout-{rank:05d}.json", name] for rank, name in enumerate(("meta.json", "plan.json", "state.pt", ""))]


def tensors_of(checkpoint):
    """The logical tensors of a checkpoint, put together by one process."""
    manifest = folders.read_manifest(checkpoint)
    _, files, shapes = usable(checkpoint, manifest, folders.damage(checkpoint, manifest))
    kinds = ((name, parameter_of(name)) for name in shapes)
    return {name: files.tensor(name.removesuffix(f".{parameter}"), parameter) for name, parameter in kinds}


def assert_same_tensors(one, two):
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


BF16 = ("half-1", "half-3", "backward-1")


@pytest.mark.parametrize(
    ("layout", "bf16"),
    [
        *(pytest.param(layout, False, id=layout) for layout in LAYOUTS),
        *(
            pytest.param(layout, True, id=f"{layout}-bf16", marks=[] if layout in BF16 else pytest.mark.slow)
            for layout in LAYOUTS
        ),
    ],
)
def test_the_same_layout_goes_on_to_the_bit(ranks4, tmp_path, layout, bf16):
    sdp, ds = LAYOUTS[layout]
    values = {"folder": str(tmp_path), "sdp": sdp, "ds": {**ds, "bf16": bf16, "clip": 1.0, "accumulation": 2}}
    values["dropout"] = 0.1
    expected = ranks4.run(f"{CASES}:save_and_go_on", timeout=90, **values)
    resumed = ranks4.run(f"{CASES}:load_and_go_on", timeout=90, **values)
    assert_owners_equal(resumed)
    for before, after in zip(expected, resumed, strict=True):
        for key in ("losses", "norms", "draws", "lr"):
            assert after[key] == before[key], key
        assert after["client_state"] == {"consumed": 17, "name": "x"}
        assert after["steps"] == 5
        assert all(torch.equal(value, after["owned"][name][1]) for name, (_, value) in before["owned"].items())
    assert_same_tensors(expected[0]["full"], resumed[0]["full"])


PAIRS = [
    ("half-1", "three_quarters-1"), ("half-0", "layers-3"), ("layers-1", "backward-1"), ("backward-0", "half-3"),
    ("half-3", "dense-1"), ("dense-3", "quarter-2"), ("replicas-1", "branches-0"), ("backward-layers-2", "replicas-1"),
    ("quarter-2", "half-2-owner_sets"), ("branches-0", "dense-3"),
]  # fmt: skip


def check_pair(pool_of, tmp_path, one, two, worlds=(4, 4), **values):
    sdp, ds = LAYOUTS[one]
    first = tmp_path / "first"
    saved = pool_of(worlds[0]).run(
        f"{CASES}:save_and_go_on", timeout=90, folder=str(first), sdp=sdp, ds=ds, more=0, **values
    )
    sdp, ds = LAYOUTS[two] if isinstance(two, str) else two
    loaded = pool_of(worlds[1]).run(
        f"{CASES}:load_and_save", timeout=90, folder=str(first), out=str(tmp_path / "second"), sdp=sdp, ds=ds, **values
    )
    assert_owners_equal(loaded)
    assert_same_tensors(saved[0]["full"], loaded[0]["full"])
    tags = [(tmp_path / name / "latest").read_text() for name in ("first", "second")]
    assert tags == ["global_step3"] * 2
    assert_same_tensors(*(tensors_of(tmp_path / name / tags[0]) for name in ("first", "second")))


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_any_layout_goes_to_any_other(pools, tmp_path, one, two):
    check_pair(pools, tmp_path, one, two, model=BIASES)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "two"), itertools.permutations(LAYOUTS, 2))
def test_every_layout_goes_to_every_other(pools, tmp_path, one, two):
    check_pair(pools, tmp_path, one, two, family="qwen2", model={"tie_word_embeddings": True})


@pytest.mark.parametrize(("one", "two"), [("half-1", (4, 3)), ("backward-0", (4, 3))])
def test_another_number_of_ranks(pools, tmp_path, one, two):
    check_pair(pools, tmp_path, one, ({"coverage": "2/3"}, {"stage": 2}), worlds=two)


def test_frozen_parameters_come_back(pools, tmp_path):
    frozen = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    check_pair(pools, tmp_path, "half-1", "backward-1", frozen=frozen)


@pytest.mark.parametrize("to_frozen", [True, False])
def test_a_parameter_may_be_frozen_in_one_job_and_trained_in_another(ranks4, tmp_path, to_frozen):
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    folder = str(tmp_path)
    for one, two in (((), names), (names, ()))[:: 1 if to_frozen else -1][:1]:
        values = {"sdp": HALF, "ds": {"stage": 1}, "timeout": 60, "folder": folder}
        saved = ranks4.run(f"{CASES}:save_and_go_on", more=0, frozen=one, **values)
        loaded = ranks4.run(f"{CASES}:load_and_go_on", frozen=two, **values)
    assert_same_tensors(saved[0]["full"], loaded[0]["loaded"])
    for name in names:
        assert torch.equal(loaded[0]["full"][name], saved[0]["full"][name]) == to_frozen


@pytest.mark.parametrize("layout", ["half-0", "half-3", "backward-1"])
def test_saved_beside_training_is_what_was_there_when_it_began(ranks4, tmp_path, layout):
    sdp, ds = LAYOUTS[layout]
    values = {"folder": str(tmp_path), "sdp": {**sdp, "checkpoint": {"async": True}}, "ds": {**ds, "bf16": True}}
    expected = ranks4.run(f"{CASES}:save_and_go_on", timeout=90, **values)
    resumed = ranks4.run(f"{CASES}:load_and_go_on", timeout=90, **values)
    for before, after in zip(expected, resumed, strict=True):
        assert (after["losses"], after["norms"]) == (before["losses"], before["norms"])
        assert before["stats"]["checkpoint_stall_seconds"] > 0.0
    assert_same_tensors(expected[0]["full"], resumed[0]["full"])


def test_an_error_beside_training_comes_with_the_next_call(ranks4, tmp_path):
    sdp = {**HALF, "checkpoint": {"async": True}}
    for messages, losses in ranks4.run(
        f"{CASES}:save_errors", timeout=60, folder=str(tmp_path), sdp=sdp, ds={"stage": 2}
    ):
        assert [message.split(":")[0] for message in messages] == ["OutputError", "CheckpointError"]
        assert losses


def test_a_writer_that_is_killed_leaves_the_folder_as_it_was_and_the_job_goes_on(ranks4, tmp_path):
    results = ranks4.run(f"{CASES}:save_with_a_writer_that_is_killed", timeout=60, folder=str(tmp_path / "c"))
    for message, names, losses in results:
        assert message == results[0][0]
        assert message.startswith("OutputError: rank 2: cannot write ")
        assert message.endswith("tensors-00002.safetensors: the process that writes it is killed by signal 9")
        assert names == [["global_step1", "latest"]] * 2 + [["global_step1", "global_step3", "latest"]]
        assert len(losses) == 3


def test_a_rank_reads_its_own_files_and_no_list_of_all(ranks4, tmp_path):
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1, "bucket": 4000}}
    ranks4.run(f"{CASES}:save_and_go_on", timeout=60, steps=1, more=0, **values)
    of_all = {"manifest.json", "meta.json", "state.pt"}
    for rank, opened in enumerate(ranks4.run(f"{CASES}:files_read", timeout=60, **values)):
        layouts = [f"layout-{worker:05d}.json" for worker in ([rank] if rank else range(4))]  # rank 0 compares them
        own = {f"rank-{rank:05d}.json", f"rank-{rank:05d}.pt", f"tensors-{rank:05d}.safetensors"}
        assert own | of_all | {*layouts} <= opened <= own | of_all | {*layouts, "plan.json", *VERIFIED[rank]}


def test_a_missing_latest_loads_nothing(ranks4, tmp_path):
    results = ranks4.run(f"{CASES}:load_and_go_on", timeout=60, folder=str(tmp_path), sdp=HALF, ds={"stage": 1}, more=0)
    assert [(result["path"], result["client_state"]) for result in results] == [(None, None)] * 4


def damaged(checkpoint, how):
    file = checkpoint / "tensors-00002.safetensors"
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[:-100])
    elif how == "flipped":
        content[-5] ^= 4
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    else:
        manifest = checkpoint / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes": 1'))
        return manifest
    return file


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "manifest"])
def test_damage_is_found_named_and_another_offered(ranks4, tmp_path, how):
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1}}
    for tag in ("old", "new"):
        ranks4.run(f"{CASES}:save_and_go_on", timeout=60, tag=tag, steps=1, more=0, **values)
    file = damaged(tmp_path / "new", how)
    messages = ranks4.run(f"{CASES}:load_error", timeout=60, **values)
    assert len(set(messages)) == 1
    assert str(file) in messages[0]
    assert messages[0].endswith("complete ones there: old")
    assert ranks4.run(f"{CASES}:load_error", timeout=60, tag="old", **values) == [None] * 4


def test_hostile_files_are_refused(ranks4, tmp_path):
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1}}
    ranks4.run(f"{CASES}:save_and_go_on", timeout=60, tag="t", steps=1, more=0, **values)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    checkpoint = tmp_path / "t"
    torch.save({"client_state": Hostile()}, checkpoint / "state.pt")
    described = folders.describe_file(checkpoint / "state.pt")
    change_manifest(checkpoint, lambda body: body["files"].update({"state.pt": described}))
    for message in ranks4.run(f"{CASES}:load_error", timeout=60, **values):
        assert "state.pt is refused" in message
    assert not (tmp_path / "owned").exists()
    for tag in ("../t", ".hidden", "latest"):
        assert all("tag: got" in m for m in ranks4.run(f"{CASES}:load_error", timeout=60, **{**values, "tag": tag}))


def test_pickled_state_that_no_job_writes_is_one_error_on_all_ranks(ranks4, tmp_path):
    state, of_rank = ("state.pt", folders.MANIFEST), ("rank-00002.pt", "rank-00002.json")
    changes = {
        "optimizer_scalars": (*state, ("optimizer_scalars", 0, "step"), -1),
        "has 1 parameter groups": (*state, ("optimizer_scalars",), []),
        "optimizer_groups.lr: got 'x'": (*state, ("optimizer_groups", 0, "lr"), "x"),
        "optimizer_groups.betas": (*state, ("optimizer_groups", 0, "betas"), ()),
        "loss_scaler.cur_scale: got None": (*state, ("loss_scaler", "state", "cur_scale"), None),
        "WarmupLR does not take its state": (*state, ("lr_scheduler",), {}),
        "random numbers are refused": (*of_rank, ("random", "numpy"), None),
    }
    for messages in ranks4.run(f"{CASES}:refused_states", folder=str(tmp_path), changes=list(changes.values())):
        for expected, message in zip(changes, messages, strict=True):
            assert message.startswith("CheckpointError: ")
            assert expected in message
            assert "\n" not in message


def test_another_model_is_refused_in_words(ranks4, tmp_path):
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1}}
    ranks4.run(f"{CASES}:save_and_go_on", timeout=60, steps=1, more=0, **values)
    messages = ranks4.run(f"{CASES}:load_error", timeout=60, **values, model={"intermediate_size": 60})
    assert "has shape [32, 53]; the model takes [32, 60]" in messages[0]


def test_another_optimizer_is_refused_in_words(ranks4, tmp_path):
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1}}
    ranks4.run(f"{CASES}:save_and_go_on", timeout=60, steps=1, more=0, **values)
    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    messages = ranks4.run(f"{CASES}:load_error", timeout=60, **values, optimizer=optimizer)
    assert "has the state of AdamW; the optimizer is SGD" in messages[0]


@pytest.mark.parametrize("layout", ["layers-1", "backward-0", "half-3"])
def test_a_huggingface_folder_is_a_start(ranks4, tmp_path, layout):
    sdp, ds = LAYOUTS[layout]
    values = {"model": {"tie_word_embeddings": True}, "family": "qwen3"}
    results = ranks4.run(f"{CASES}:from_hf_folder", timeout=60, folder=str(tmp_path / "hf"), sdp=sdp, ds=ds, **values)
    assert_same_tensors(*results[0][:2])


@pytest.fixture(scope="module")
def checkpoint(ranks4, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    values = {"sdp": HALF, "ds": {"stage": 2, "bf16": True}, "family": "qwen3", "model": {"tie_word_embeddings": True}}
    saved = ranks4.run(f"{CASES}:save_and_go_on", timeout=60, folder=str(folder), more=0, **values)
    return folder, saved[0]["full"]


@pytest.mark.parametrize("shard_bytes", [10_000, 2 << 30])
def test_export_streams_the_full_model(checkpoint, tmp_path, shard_bytes):
    folder, full = checkpoint
    export(locate(folder), tmp_path / "hf", shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_bytes == 10_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert_same_tensors({name: value.float() for name, value in model.state_dict().items()}, full)


def test_inspect_and_export_from_the_console(checkpoint, tmp_path, capsys):
    folder, full = checkpoint
    assert main(["inspect", str(folder), "--verify", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    numel = sum(p.numel() for p in build_model("qwen3", {"tie_word_embeddings": True}).parameters())
    assert summary["elements"] == {"master": numel, "optimizer.exp_avg": numel, "optimizer.exp_avg_sq": numel}
    assert (summary["steps"], summary["written_by"]["ranks"], summary["verified"]) == (3, 4, True)
    assert main(["inspect", str(folder)]) == 0
    assert "exp_avg" in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").state_dict()
    # fp32 are the master weights, of which training has the bf16.
    assert_same_tensors({name: value.bfloat16().float() for name, value in exported.items()}, full)
    assert main(["export", str(tmp_path), str(tmp_path / "other")]) == 1
    assert "there is none in" in capsys.readouterr().err


def test_old_checkpoints_are_removed(ranks4, tmp_path):
    sdp = {"checkpoint": {"keep_last": 2, "keep_every": 3}}
    left = ranks4.run(f"{CASES}:save_every_step", timeout=60, folder=str(tmp_path), steps=7, **sdp)[0]
    assert left == ["global_step3", "global_step6", "global_step7", "latest"]


@pytest.mark.parametrize(("one", "two"), [(True, False), (False, True)], ids=["bf16-fp32", "fp32-bf16"])
def test_another_precision(ranks4, tmp_path, one, two):
    for place, (folder, bf16) in enumerate((("first", one), ("second", two))):
        values = {"sdp": HALF, "ds": {"stage": 2, "bf16": bf16}, "timeout": 60}
        if place == 0:
            ranks4.run(f"{CASES}:save_and_go_on", folder=str(tmp_path / folder), more=0, **values)
        else:
            first = str(tmp_path / "first")
            ranks4.run(f"{CASES}:load_and_save", folder=first, out=str(tmp_path / folder), **values)
    assert_same_tensors(*(tensors_of(tmp_path / name / "global_step3") for name in ("first", "second")))


@pytest.mark.parametrize(
    ("sdp", "family", "model"),
    [
        (HALF, "llama", {"intermediate_size": 64, **BIASES}),
        ({"coverage": 0.75, "output_scaling": "none"}, "qwen3", {"intermediate_size": 64}),
        ({**LAYERS, "output_scaling": "none"}, "qwen2", {"num_hidden_layers": 4}),
        ({**HALF, "partition": ["mlp"]}, "llama", {"intermediate_size": 64, "tie_word_embeddings": True}),
    ],
    ids=["half-scaled", "three_quarters-qwen3", "layers-qwen2", "mlp_only-tied"],
)
def test_a_subnetwork_is_a_smaller_model(ranks4, tmp_path, sdp, family, model):
    logits = ranks4.run(
        f"{CASES}:subnetworks", timeout=60, folder=str(tmp_path / "c"), sdp=sdp, family=family, model=model
    )
    full = sum(p.numel() for p in build_model(family, model).parameters())
    for worker in (0, 3):
        out = tmp_path / str(worker)
        assert main(["export", str(tmp_path / "c"), str(out), "--subnetwork", str(worker)]) == 0
        small = AutoModelForCausalLM.from_pretrained(out).eval()
        assert sum(p.numel() for p in small.parameters()) < 0.9 * full
        with torch.no_grad():
            found = small(input_ids=torch.arange(24).view(2, 12)).logits
        torch.testing.assert_close(found, logits[worker], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sdp", "model", "message"),
    [
        (LAYERS, {}, 'got output_scaling "inverse_sqrt_coverage" with whole layers as units'),
        ({**LAYERS, "granularity": "branch"}, {}, "no words for layers that lack a branch"),
        (BACKWARD, {}, 'got a checkpoint of masking "backward"'),
        (HALF, {"num_key_value_heads": 1}, "owns 0 or 1 units of attention by layer"),
    ],
    ids=["scaled_layers", "branches", "backward", "absent_attention"],
)
def test_a_subnetwork_that_a_config_cannot_say_is_refused(ranks4, tmp_path, capsys, sdp, model, message):
    ranks4.run(f"{CASES}:subnetworks", timeout=60, folder=str(tmp_path / "c"), sdp=sdp, model=model)
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out"), "--subnetwork", "0"]) == 1
    assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out"), "--subnetwork", "9"]) == 1
    assert "takes 0 to 3" in capsys.readouterr().err


def test_what_json_cannot_hold_is_one_error_on_all_ranks(ranks4, tmp_path):
    results = ranks4.run(f"{CASES}:save_what_json_cannot_hold", timeout=60, folder=str(tmp_path))
    assert {message for message, _ in results} == {results[0][0]}
    assert results[0][0].startswith("CheckpointError: rank 0: TypeError: Object of type set is not JSON serializable")
    assert all(losses for _, losses in results)


def test_names_that_lead_out_of_a_folder_are_refused(checkpoint, tmp_path, capsys):
    folder = tmp_path / "c"
    shutil.copytree(locate(checkpoint[0]), folder)
    name = "layout-00000.json"
    text = (folder / name).read_text()
    for bad in ("/tmp/x", "../x", "a/b.x", ""):
        (folder / name).write_text(text.replace('"model.norm.weight"', json.dumps(bad)))
        described = folders.describe_file(folder / name)
        change_manifest(folder, lambda body, described=described: body["files"].update({name: described}))
        assert main(["export", str(folder), str(tmp_path / "u"), "--universal"]) == 1
        assert f"{name}: tensors.{bad}" in capsys.readouterr().err
        assert not list(tmp_path.glob("u/*"))


def test_models_that_cannot_be_cut_say_what_to_do(ranks4):
    advice = ("merge_and_unload", "without quantization_config", "without device_map")
    for messages in ranks4.run(f"{CASES}:refused_models", timeout=60):
        assert all(part in message for part, message in zip(advice, messages, strict=True))


def test_the_full_model_generates_and_is_empty_afterwards(ranks4):
    for settings, length, left, losses in ranks4.run(f"{CASES}:whole_models", timeout=60):
        assert (settings, left) == ((5, 96), {"meta"})
        assert length == 11
        assert losses


def test_a_save_that_fails_says_so_on_all_ranks_and_the_job_goes_on(ranks4, tmp_path):
    results = ranks4.run(f"{CASES}:save_errors", timeout=60, folder=str(tmp_path), sdp=HALF, ds={"stage": 2})
    for messages, losses in results:
        assert messages == results[0][0]
        assert messages[0].startswith("OutputError: rank 0: cannot write the checkpoint")
        assert messages[1].startswith("CheckpointError: rank 0: client_state: cannot be loaded safely")
        assert losses
    assert [path.name for path in (tmp_path / "ok").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_folder_that_another_job_writes_is_refused_on_all_ranks(ranks4, tmp_path, is_async):
    locks = FolderLocks()
    locks.take(tmp_path)
    results = ranks4.run(f"{CASES}:save_once", timeout=60, folder=str(tmp_path), is_async=is_async)
    assert os.listdir(tmp_path) == [LOCK]
    locks.release()
    assert len({message for message, _ in results}) == 1
    assert results[0][0].startswith("OutputError: rank 0: checkpoint: ")
    assert f"is written by process {os.getpid()} on " in results[0][0]
    assert all(losses for _, losses in results)
    assert ranks4.run(f"{CASES}:save_once", timeout=60, folder=str(tmp_path), is_async=is_async)[0][0] is None
    assert sorted(os.listdir(tmp_path)) == ["global_step1", "latest"]


def test_the_dense_baselines_checkpoints_are_whole_too(ranks4, tmp_path):
    for names, steps, is_last, left in ranks4.run(f"{CASES}:dense_saves", timeout=60, folder=str(tmp_path)):
        assert {"t", "latest"} <= set(names[0])
        assert not [name for name in names[1] if ".new-" in name or "replaced" in name]
        assert (steps, is_last) == (2, True)
        assert LOCK not in left


WATCHED = """
import sys, threading, time
from pathlib import Path
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from deepspeed_sdp.checkpoint.export import export
from deepspeed_sdp.checkpoint.recovery import usable
from deepspeed_sdp.checkpoint.summary import locate

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

seen = [own()]
def watch():
    while True:
        seen.append(own())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
export(locate(Path(sys.argv[1])), Path(sys.argv[2]), torch.float32, shard_bytes=8 << 20)
print(max(seen) - seen[0])
"""


@pytest.mark.slow
def test_export_takes_less_memory_than_the_model(ranks4, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 2048, "head_dim": 64}
    values = {"folder": str(tmp_path), "sdp": HALF, "ds": {"stage": 1}, "model": sizes}
    saved = ranks4.run(f"{CASES}:save_and_go_on", timeout=120, steps=1, more=0, **values)
    nbytes = sum(value.numel() * 4 for value in saved[0]["full"].values())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    arguments = [sys.executable, "-c", WATCHED, str(tmp_path), str(tmp_path / "hf")]
    done = subprocess.run(arguments, check=True, timeout=120, env=environment, stdout=subprocess.PIPE)
    # Beside what torch and transformers take anyway; mapped pages of files are the system's.
    assert int(done.stdout) < 0.25 * nbytes
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert_same_tensors(dict(exported), saved[0]["full"])
