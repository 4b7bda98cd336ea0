"""Random plans, bucket sizes and delays: all ranks get through, and to the right weights."""

import random

import pytest

from tests.support.compare import assert_like, assert_owners_equal, simulate


def random_case(seed):
    draw = random.Random(seed)
    world = draw.choice([3, 4])
    model = {
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "intermediate_size": draw.choice([7, 24, 53]),
        "num_key_value_heads": draw.choice([1, 2, 4, 8]),
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
    }
    sdp = {
        "owners_per_unit": draw.randint(2, world - 1),
        "design": draw.choice(["random", "cyclic"]),
        "seed": draw.randrange(1000),
        "chunk_multiple": draw.choice([1, 4, 64]),
    }
    stage, bucket = draw.choice([0, 1, 2, 2]), draw.choice([1, 60, 500, 3000])
    ds = {"stage": stage, "bucket": bucket, "accumulation": draw.choice([1, 2])}
    return world, {"model": model, "sdp": sdp, "ds": ds, "sleep": seed, "steps": 3}


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 120))])
def test_no_hang_with_random_delays(pools, seed):
    world, values = random_case(seed)
    results = pools(world).run("tests.engine.cases:train", timeout=90, **values)
    assert_owners_equal(results)
    arguments = {key: values[key] for key in ("model", "sdp", "ds", "steps")}
    assert_like(results, simulate(results[0], world=world, **arguments))
