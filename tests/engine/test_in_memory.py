"""The state that nodes keep in memory: taken up to the bit, in any layout, and where a node is lost with it."""

import shutil

import pytest

from tests.engine.test_checkpoints import BACKWARD, HALF, LAYERS, assert_same_tensors
from tests.engine.test_lost_workers import TINY
from tests.support.compare import assert_owners_equal

CASES = "tests.engine.memory_cases"
LAYOUTS = {
    "half-0": (HALF, {"stage": 0}),
    "half-1": (HALF, {"stage": 1, **TINY}),
    "half-1-bf16": (HALF, {"stage": 1, "bf16": True}),
    "half-3": (HALF, {"stage": 3, **TINY}),
    "layers-2": (LAYERS, {"stage": 2}),
    "backward-1": (BACKWARD, {"stage": 1, **TINY}),
    "replicas-1": ({"num_subnetworks": 2, "coverage": 1.0}, {"stage": 1, **TINY}),
    "local_steps-0": ({**HALF, "schedule": {"sync_interval": 4}}, {"stage": 0}),
}
QUICK = ("half-1", "half-3", "backward-1", "local_steps-0")


def of_layouts(layouts=LAYOUTS, quick=QUICK):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in layouts]


def of_nodes(values, quick):
    return [pytest.param(value, id=str(value), marks=[] if value == quick else pytest.mark.slow) for value in values]


@pytest.mark.parametrize("nodes", of_nodes([(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)], (0, 0, 1, 1)))
@pytest.mark.parametrize("layout", of_layouts())
def test_it_goes_on_to_the_bit(ranks4, tmp_path, layout, nodes):
    sdp, ds = LAYOUTS[layout]
    values = {"folder": str(tmp_path), "nodes": nodes, "sdp": sdp, "ds": ds}
    expected = ranks4.run(f"{CASES}:keep_and_go_on", timeout=90, **values)
    resumed = ranks4.run(f"{CASES}:take_and_go_on", timeout=90, **values)
    for before, after in zip(expected, resumed, strict=True):
        assert after["is_in_memory"]
        assert (after["steps"], after["client_state"]) == (3, {"consumed": 17})
        for key in ("losses", "norms", "draws", "lr"):
            assert after[key] == before[key]
    assert_same_tensors(expected[0]["full"], resumed[0]["full"])
    if "local_steps" not in layout:
        assert_owners_equal(resumed)
    # The state before is gone, and so is what was being written.
    assert all(len(list(node.glob("*/manifest.json"))) == 1 for node in tmp_path.iterdir())
    assert not [path for node in tmp_path.iterdir() for path in node.glob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("lost", of_nodes([0, 1, 3], 1))
@pytest.mark.parametrize("layout", of_layouts([name for name in LAYOUTS if name != "local_steps-0"]))
def test_a_node_may_be_lost(ranks4, tmp_path, layout, lost):
    sdp, ds = LAYOUTS[layout]
    values = {"folder": str(tmp_path), "sdp": sdp, "ds": ds, "nodes": (0, 1, 2, 3)}
    expected = ranks4.run(f"{CASES}:keep_and_go_on", timeout=90, **values)
    shutil.rmtree(tmp_path / f"node-{lost}")
    resumed = ranks4.run(f"{CASES}:take_and_go_on", timeout=90, **values)
    assert_same_tensors(expected[0]["kept"], resumed[0]["loaded"])
    for before, after in zip(expected, resumed, strict=True):
        assert (after["losses"], after["norms"]) == (before["losses"], before["norms"])


@pytest.mark.parametrize("layout", of_layouts(["half-1", "half-3", "backward-1", "local_steps-0"], ("half-1",)))
def test_survivors_go_on_as_fewer_ranks(ranks4, pools, tmp_path, layout):
    sdp, ds = LAYOUTS[layout]
    values = {"folder": str(tmp_path), "ds": ds}
    expected = ranks4.run(f"{CASES}:keep_and_go_on", timeout=90, nodes=(0, 1, 2, 3), sdp=sdp, **values)
    shutil.rmtree(tmp_path / "node-1")
    # Ranks of another job: rank 0 was rank 3.
    values |= {"nodes": (3, 0, 2), "sdp": {**sdp, "coverage": 2 / 3}}
    resumed = pools(3).run(f"{CASES}:take_and_go_on", timeout=90, **values)
    assert all(r["is_in_memory"] and not r["problems"] for r in resumed)
    # Where workers train apart it is what owners agree on, which the job that went on had not done.
    if layout != "local_steps-0":
        assert_same_tensors(expected[0]["kept"], resumed[0]["loaded"])


def test_new_nodes_get_what_they_need(ranks4, pools, tmp_path):
    values = {"folder": str(tmp_path), "ds": {"stage": 1, **TINY}}
    expected = pools(2).run(f"{CASES}:keep_and_go_on", timeout=90, nodes=(0, 1), sdp=HALF, **values)
    grown = ranks4.run(f"{CASES}:take_and_go_on", timeout=90, nodes=(2, 0, 3, 1), sdp=HALF, **values)
    assert_same_tensors(expected[0]["kept"], grown[0]["loaded"])


def test_where_too_much_is_lost_the_checkpoint_is_taken(ranks4, tmp_path):
    sdp, ds = LAYOUTS["half-1"]
    values = {"sdp": sdp, "ds": ds}
    saved = ranks4.run(
        "tests.engine.checkpoint_cases:save_and_go_on", timeout=90, folder=f"{tmp_path}/checkpoints", more=0, **values
    )
    values |= {"folder": str(tmp_path), "nodes": (0, 1, 2, 3)}
    ranks4.run(f"{CASES}:keep_and_go_on", timeout=90, keeps=2, **values)
    for node in (0, 1, 2):
        shutil.rmtree(tmp_path / f"node-{node}")
    resumed = ranks4.run(f"{CASES}:take_and_go_on", timeout=90, **values)
    assert {r["is_in_memory"] for r in resumed} == {False}
    assert resumed[0]["steps"] == 3
    assert "is on no node, and no other file holds all that was in it" in resumed[0]["problems"][0]
    assert_same_tensors(saved[0]["full"], resumed[0]["loaded"])


def test_what_is_newer_is_taken(ranks4, tmp_path):
    sdp, ds = LAYOUTS["half-1"]
    values = {"folder": str(tmp_path), "nodes": (0, 0, 1, 1), "sdp": sdp, "ds": ds}
    for keeps, is_in_memory in ((2, True), (1, False)):
        shutil.rmtree(tmp_path / "node-0", ignore_errors=True)
        shutil.rmtree(tmp_path / "node-1", ignore_errors=True)
        ranks4.run(
            "tests.engine.checkpoint_cases:save_and_go_on",
            timeout=90,
            folder=f"{tmp_path}/checkpoints",
            sdp=sdp,
            ds=ds,
            steps=5,
            more=0,
        )
        ranks4.run(f"{CASES}:keep_and_go_on", timeout=90, keeps=keeps, **values)
        assert ranks4.run(f"{CASES}:take_and_go_on", timeout=90, **values)[0]["is_in_memory"] is is_in_memory


def test_a_damaged_part_is_read_from_its_copy(ranks4, tmp_path):
    sdp, ds = LAYOUTS["half-1"]
    values = {"folder": str(tmp_path), "nodes": (0, 0, 1, 1), "sdp": sdp, "ds": ds}
    expected = ranks4.run(f"{CASES}:keep_and_go_on", timeout=90, **values)
    [file] = (tmp_path / "node-1").glob("*/tensors-00002.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    [layout] = (tmp_path / "node-0").glob("*/layout-00001.json")
    layout.write_text("{}")
    resumed = ranks4.run(f"{CASES}:take_and_go_on", timeout=90, **values)
    assert_same_tensors(expected[0]["kept"], resumed[0]["loaded"])


def test_no_room_is_said_on_all_ranks(ranks4, tmp_path, monkeypatch):
    (tmp_path / "node-0").write_text("no folder")
    sdp, ds = LAYOUTS["half-1"]
    messages = ranks4.run(f"{CASES}:keep_error", timeout=90, folder=str(tmp_path), nodes=(1, 1, 0, 1), sdp=sdp, ds=ds)
    assert all("cannot keep the state of the training in" in message and "node-0" in message for message in messages)
