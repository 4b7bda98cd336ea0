"""The default process group is the user's: no collective of the package runs on it, or could."""

import ast
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from deepspeed_sdp import ranks
from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.errors import StateError
from deepspeed_sdp.ranks import control_group, gather_objects, meet, new_group, object_of_first
from deepspeed_sdp.waits import time_limit
from tests.support.ranks import ROOT

COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend",
    "monitored_barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor",
    "scatter", "scatter_object_list", "send",
}  # fmt: skip
FILES = sorted(path for folder in ("deepspeed_sdp", "launch") for path in (ROOT / folder).rglob("*.py"))


def calls(tree):
    """Calls of something of ``torch.distributed``, with the name that is called."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) in ("dist", "torch.distributed"):
            yield node, function.attr
        elif isinstance(function, ast.Call) and ast.unparse(function).startswith("getattr(dist, "):
            yield node, "all_gather_single"


def without_group(source):
    """Lines of collectives that name no group, or are imported by their own name."""
    tree = ast.parse(source)
    lines = []
    for node, name in calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in COLLECTIVES and given.get("group", "None") == "None":
            lines.append(node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("save", "load"):
            names = {keyword.arg for keyword in node.keywords}
            if names & {"storage_writer", "storage_reader"} and "process_group" not in names:
                lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
            lines += [node.lineno for alias in node.names if alias.name in COLLECTIVES]
    return lines


def test_every_collective_names_a_group():
    found = {str(path): lines for path in FILES if (lines := without_group(path.read_text()))}
    assert not found


def test_groups_are_made_in_one_place():
    makers = [
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(
            name in ("new_group", "new_subgroups", "init_device_mesh") for _, name in calls(ast.parse(path.read_text()))
        )
    ]
    assert makers == ["deepspeed_sdp/ranks.py"]


@pytest.mark.parametrize(
    "line",
    [
        "dist.all_reduce(x)",
        "dist.barrier()",
        "dist.broadcast(x, src=0, group=None)",
        "getattr(dist, _ALL_GATHER)(a, b)",
        "torch.distributed.all_gather_object(a, b)",
        "from torch.distributed import all_reduce",
        "save({}, storage_writer=w)",
    ],
)
def test_a_collective_without_one_is_found(line):
    assert without_group(line) == [1]


def test_the_packages_group_has_the_jobs_limit_and_ends_with_the_job(tmp_path):
    made = []
    for seconds in (70, 80):
        limit = timedelta(seconds=seconds)
        store = f"file://{tmp_path / str(seconds)}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1, timeout=limit)
        try:
            group = control_group()
            assert group is control_group() is not dist.group.WORLD
            assert time_limit() == limit == group._get_backend(torch.device("cpu")).options._timeout
            assert gather_objects({"a": 1}, "a test") == [{"a": 1}]
            assert object_of_first("b", "a test") == "b"
            meet("a test")
            made.append(Group(new_group([0], "a test"), [0]))
        finally:
            dist.destroy_process_group()
    for group in made:
        # Of a job that is over: nothing is left to free, and nothing to use.
        group.destroy()
        with pytest.raises(StateError, match="destroyed"):
            _ = group.handle


def test_the_limit_is_the_jobs_where_the_user_made_the_store():
    limit = timedelta(seconds=70)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    try:
        assert time_limit() == limit == control_group()._get_backend(torch.device("cpu")).options._timeout
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("can_split", "family", "splits"), [(True, 2, 1), (True, 1, 0), (False, 2, 0)])
def test_disjoint_groups_are_one_split_where_the_world_can_be_split(monkeypatch, can_split, family, splits):
    """Of NCCL's bound communicator every new group would be a split, in which all ranks take part."""
    made = []
    backend = SimpleNamespace(supports_splitting=can_split)
    world = SimpleNamespace(bound_device_id=torch.device("cuda", 0), _get_backend=lambda device: backend)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(ranks, "time_limit", lambda: timedelta(seconds=70))
    monkeypatch.setattr(ranks, "split_group", lambda **named: made.append(named["split_ranks"]) or "split")
    monkeypatch.setattr(ranks, "new_group", lambda ranks, purpose: tuple(ranks))
    groups = [[0, 1], [2, 3]][2 - family :]
    assert ranks.new_groups(groups, "a test") == ("split" if splits else (2, 3))
    assert made == [groups] * splits
