"""An elastic run on another number of ranks: whatever is left, it fits."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_sdp.config import BLOCK
from deepspeed_sdp.data.streaming import check_lanes
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.pretraining.fitting import First, check_fits, fitted, most_ranks
from deepspeed_sdp.pretraining.recipe import make_run


def run_of(block, batch, micro, data=None, **length):
    sections = {
        "model": {"path": "llama-15m"},
        "data": data or {"seq_length": 128},
        "length": length or {"tokens": 1e6},
        BLOCK: block,
        "deepspeed": {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro},
    }
    return make_run(sections, [], "test", None)


@st.composite
def jobs(draw):
    workers = draw(st.integers(1, 16))
    owners = draw(st.integers(1, workers))
    replicas = draw(st.integers(1, 3))
    micro, accumulation = draw(st.integers(1, 16)), draw(st.integers(1, 4))
    block = {"num_subnetworks": workers, "coverage": f"{owners}/{workers}"}
    if draw(st.booleans()):
        block["coverage"] = {"mlp": block["coverage"], "attention": f"{draw(st.integers(1, workers))}/{workers}"}
    elif draw(st.booleans()):
        block = {
            "num_subnetworks": workers,
            "schedule": {"coverage_schedule": [[0.0, f"{owners}/{workers}"], [0.5, 1.0]]},
        }
    world = workers * replicas
    return run_of(block, world * micro * accumulation, micro), world


def owners_of(run, ranks):
    workers = run.sdp.subnetworks(ranks)
    owners = run.sdp.owners(workers)
    return workers, list(owners.values()) if isinstance(owners, dict) else [owners]


@given(jobs(), st.integers(1, 48))
def test_any_number_of_ranks_fits(job, ranks):
    run, world = job
    first = First(world, 777)
    now = fitted(run, first, ranks)
    assert (now is run) == (ranks == world)
    # The schema, DeepSpeed's rule of batches, and whole numbers of owners hold.
    assert now.global_batch(ranks) == now.micro_batch(ranks) * now.micro_batches(ranks) * ranks
    assert now.micro_batch(ranks) <= run.micro_batch(world)
    before, had = owners_of(run, world)
    after, has = owners_of(now, ranks)
    for one, other in zip(had, has, strict=True):
        assert other / after <= max(one / before, 1 / after) + 1e-9
        assert (one == before) == (other == after) or after == 1
    assert json.dumps(now.ds_config)
    if now is not run:
        assert now.length.steps == 777
        # None that is as large can be nearer than one sequence of each rank.
        assert abs(now.global_batch(ranks) - run.global_batch(world)) <= max(ranks, 0.1 * run.global_batch(world))


def test_what_it_comes_to():
    run = run_of({"num_subnetworks": 8, "coverage": 0.5}, 64, 8)
    found = {}
    for ranks in (7, 6, 5, 4, 3, 2, 1):
        now = fitted(run, First(8, 10), ranks)
        workers, [owners] = owners_of(now, ranks)
        found[ranks] = (workers, owners, now.micro_batch(ranks), now.micro_batches(ranks))
    assert found == {
        7: (7, 3, 5, 2),
        6: (6, 3, 5, 2),
        5: (5, 2, 7, 2),
        4: (4, 2, 8, 2),
        3: (3, 1, 7, 3),
        2: (2, 1, 8, 4),
        1: (1, 1, 8, 8),
    }


def test_lanes_of_a_stream_are_dealt_evenly():
    data = {"stream": ["x.parquet"], "tokenizer": "t", "seq_length": 128}
    run, first = run_of({"num_subnetworks": 8, "coverage": 0.5}, 48, 6, data), First(8, 10)
    for ranks in range(1, 9):
        members = most_ranks(run, first, ranks)
        now = fitted(run, first, members)
        assert now.global_batch(members) == 48
        check_lanes(48, members, 48)
    assert [most_ranks(run, first, ranks) for ranks in (8, 7, 6, 5)] == [8, 6, 6, 4]


def test_replicas_stay_where_they_share_the_optimizers_state():
    block = {"num_subnetworks": 4, "coverage": 0.5, "schedule": {"sync_interval": 5}}
    run = run_of(block, 64, 8)
    assert {ranks: fitted(run, First(8, 10), ranks).sdp.num_subnetworks for ranks in (6, 4)} == {6: 3, 4: 2}


def test_an_order_of_ranks_for_equal_nodes_is_given_up():
    run = run_of({"num_subnetworks": 4, "plan": {"rank_order": "owners_across_nodes", "seed": 3}}, 64, 8)
    plan = fitted(run, First(4, 10), 3).sdp.plan
    assert (plan.rank_order, plan.seed) == ("auto", 3)


@pytest.mark.parametrize(
    ("block", "what"),
    [
        ({"enabled": False}, "the dense baseline"),
        ({"plan": {"file": "plan.json"}}, "sdp.plan.file"),
        ({"num_subnetworks": 2, "plan": {"worker_capacity": [1.0, 2.0]}}, "sdp.plan.worker_capacity"),
    ],
)
def test_what_is_for_one_number_of_ranks_is_refused(block, what):
    with pytest.raises(ConfigError, match=f"^--elastic: got {what}"):
        check_fits(run_of(block, 64, 8))
