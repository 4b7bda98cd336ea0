"""Plan files from anywhere: whatever they say is a plan or one line of error, in little time and memory."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import SubnetworkPlan, UnitSpace, make_plan

SPACES = [
    UnitSpace(f"{kind}{i}", kind, i, units, 6) for i in range(3) for kind, units in (("mlp", 40), ("attention", 4))
]
PLAN = make_plan(SPACES, 4, owners_per_unit={"mlp": 2, "attention": 3})
CAPACITY = make_plan(SPACES, 4, owners_per_unit=2, worker_capacity=[1, 1, 2, 2], shared_flops=5.0)


def refusal(text: str | bytes, folder: Path) -> str:
    file = folder / "plan.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(PlanError) as caught:
            SubnetworkPlan.read(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2
    assert peak < 100e6
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(file))
    return message


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **values})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(num_subnetworks=10**9), "plan num_subnetworks: got 1000000000"),
        (changed(num_subnetworks=16384), "owner_sets: the first must hold all workers 0 to 16383"),
        (changed(num_subnetworks=-4), "plan num_subnetworks: got -4"),
        (changed(owners_per_unit={"mlp": True, "attention": 3}), "plan owners_per_unit"),
        (changed(owner_sets=[]), "plan owner_sets: got []"),
        (changed(owner_sets=[[]]), "plan owner_sets[0]: got []"),
        (changed(seed=10**39), "plan seed"),
        (changed(seed=1.0), "plan seed: got 1.0"),
        (changed(version=True), "plan version: got true, takes 1"),
        (changed(spaces=[]), "plan spaces: got []"),
        (changed(shared_flops=-1), "plan shared_flops: got -1"),
        (changed(worker_capacity=[0, 1, 1, 1]), "plan worker_capacity"),
        (changed(**{"x" * 1000: 1}), "unknown key"),
        (changed(design="d" * 100_000), "plan design"),
        (changed(shared_flops=float("nan")), "got NaN, takes finite numbers"),
        (PLAN.to_json().replace('"seed":0', '"seed":1e400'), "got 1e400, takes finite numbers"),
        (PLAN.to_json().replace('"seed":0', '"seed":0,"seed":0'), 'the key "seed" stands twice'),
        (PLAN.to_json().replace('"seed":0', '"seed":' + "9" * 100_000), "an integer of 100000 digits"),
        ("[" * 1_000_000, "nested too deeply"),
        ('{"version":1,"spaces":' * 100_000, "nested too deeply"),
        ("", "not valid JSON"),
        (b"\xff\xfe{}", "is not a text file"),
        (b" " * (2**24 + 1), "is larger than 16 MiB"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) and len(value) < 80 else "",
)
def test_hostile_files_are_refused_in_one_line_and_at_once(text: str | bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(text, tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match=f"cannot read {path}: "):
            SubnetworkPlan.read(path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**12, 10**39]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 5), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(0, 5), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    document: Any = json.loads(draw(st.sampled_from([PLAN, CAPACITY])).to_json())
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from([place for place in places(document) if place]))
        target = document
        for parent in parents:
            target = target[parent]
        change = draw(st.sampled_from(["set", "drop", "copy"]))
        if change == "drop":
            del target[key]
        elif change == "copy" and isinstance(target, list):
            target.insert(key, target[key])
        else:
            target[key] = draw(VALUES)
        if not document:
            break
    text = json.dumps(document)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@settings(max_examples=300)
@given(mutated())
def test_a_changed_file_is_another_valid_plan_or_refused(text: str) -> None:
    refusal = ""
    try:
        plan = SubnetworkPlan.from_json(text)
    except PlanError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    plan.validate()
    again = SubnetworkPlan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    json.dumps(plan.summary(), allow_nan=False)
    for space in plan.spaces:
        assert len(plan.owners(space.space.name, space.space.num_units - 1)) == plan.owners_of_kind(space.space.kind)
