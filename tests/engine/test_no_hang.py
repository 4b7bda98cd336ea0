"""Random plans, bucket sizes and delays: all ranks get through, and to the right weights."""

import random

import pytest

from tests.support.compare import assert_like, assert_owners_equal, simulate
from tests.support.ranks import RankPool


def random_case(seed, worlds=(3, 4)):
    draw = random.Random(seed)
    world = draw.choice(worlds)
    model = {
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "intermediate_size": draw.choice([7, 24, 53]),
        "num_key_value_heads": draw.choice([1, 2, 4, 8]),
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
    }
    granularity = draw.choice(["neuron", "neuron", "layer", "branch"])
    if granularity != "neuron":
        model["num_hidden_layers"] = draw.choice([4, 6, 7])
    stage, bucket = draw.choice([0, 1, 2, 3, 3]), draw.choice([1, 1000, 4000, 9000])
    sdp = {
        "granularity": granularity,
        # Two owners each of a few units leave six workers unconnected, which is refused.
        "coverage": f"{draw.randint(min(max(2, world // 2), world - 1), world - 1)}/{world}",
        "plan": {
            # Random sets of a few spaces can leave the workers unconnected, which is refused.
            "design": draw.choice(["random", "cyclic"])
            if model["num_hidden_layers"] > 2 and granularity == "neuron"
            else "cyclic",
            "seed": draw.randrange(1000),
            "chunk_multiple": draw.choice([1, 4, 64]),
        },
        "comm": {"transport": draw.choice(["owner_sets", "all_to_all"]) if stage else "auto"},
    }
    ds = {"stage": stage, "bucket": bucket, "accumulation": draw.choice([1, 2])}
    if world == 4 and draw.random() < 0.5:
        sdp |= {"num_subnetworks": 2, "coverage": draw.choice([0.5, 1.0])}
        sdp["plan"]["design"] = "cyclic"
    return world, {"model": model, "sdp": sdp, "ds": ds, "sleep": seed, "steps": 3}


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 120))])
def test_no_hang_with_random_delays(pools, seed):
    world, values = random_case(seed)
    results = pools(world).run("tests.engine.cases:train", timeout=90, **values)
    assert_owners_equal(results)
    arguments = {key: values[key] for key in ("model", "sdp", "ds", "steps")}
    assert_like(results, simulate(results[0], world=world, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 5, 6])
@pytest.mark.parametrize("seed", range(200, 240))
def test_no_hang_on_other_numbers_of_ranks(pools, world, seed):
    _, values = random_case(seed, worlds=(world,))
    results = pools(world).run("tests.engine.cases:train", timeout=120, **values)
    assert_owners_equal(results)


TWO_OF_3 = {"coverage": "2/3"}
EACH_STAGE = [
    *({"sdp": TWO_OF_3, "ds": {"stage": stage, "bucket": 4000}, "steps": 2} for stage in (0, 1, 2, 3)),
    {
        "sdp": {
            **TWO_OF_3,
            "masking": "backward",
            "backward": {"overlap_refresh": True},
        },
        "ds": {"stage": 2},
        "steps": 2,
    },
]


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 40), marks=pytest.mark.slow)], ids=str)
def test_torchs_own_checks_find_nothing(seeds):
    """torch compares every collective over the ranks of its group, and would say so in the log or raise."""
    pool = RankPool(3, TORCH_DISTRIBUTED_DEBUG="DETAIL", TORCH_CPP_LOG_LEVEL="WARNING")
    try:
        for values in [*EACH_STAGE, *(random_case(seed, worlds=(3,))[1] for seed in seeds)]:
            assert_owners_equal(pool.run("tests.engine.cases:train", timeout=120, **values))
        said = pool.log.read_text(errors="replace")
    finally:
        pool.stop()
    assert not [line for line in said.splitlines() if "ollective" in line or "ProcessGroup" in line]


TRANSPORTS = [
    pytest.param({"all_to_all": all_to_all, "sharded": sharded, "replicas": replicas}, id=f"{name}-{replicas}")
    for replicas in (1, 2)
    for all_to_all, sharded, name in ((True, True, "all_to_all"), (False, True, "owner_sets"), (False, False, "whole"))
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 70))])
def test_gradients_are_averaged_in_whatever_order_they_come(ranks4, seed, transport):
    errors = ranks4.run("tests.engine.gradient_cases:reduce_in_random_order", timeout=30, seed=seed, **transport)
    assert max(errors) < 1e-12


def test_a_users_barrier_in_a_gradient_hook_may_stand_elsewhere_on_each_rank(pools):
    averages = pools(2).run("tests.engine.gradient_cases:reduce_beside_a_users_barrier", timeout=30)
    assert averages == [[index + 0.5 for index in range(6)]] * 2
