"""Backward masking on ranks: the dense forward pass, owned gradients, and weights that are never stale."""

import itertools

import pytest

from tests.engine.cases import build_model
from tests.support.compare import assert_like, assert_owners_equal, simulate

LAYERS = {"granularity": "block"}
BRANCHES = {"granularity": "block", "block_unit": "branch"}
ONE_KV = {"num_key_value_heads": 1}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


def row(name, *, sdp=None, stage=1, family="llama", model=None, bucket=4000, world=4, extra=None, **ds):
    sdp = {"masking": "backward", "coverage": 0.5, **(sdp or {})}
    if "owners_per_unit" in sdp:
        del sdp["coverage"]
    ds = {"stage": stage, "bucket": bucket, **ds}
    values = {"sdp": sdp, "family": family, "model": model or {}, "ds": ds, **(extra or {})}
    return pytest.param(values, world, id=name)


@pytest.mark.parametrize(
    ("values", "world"),
    [
        *(row(f"stage{stage}", stage=stage) for stage in (0, 1, 2)),
        *(row(f"stage{s}-clip-accumulate-biases", stage=s, model=BIASES, accumulation=2, clip=1.0) for s in (0, 1, 2)),
        *(row(f"layers-stage{s}", sdp=LAYERS, stage=s, model={"num_hidden_layers": 5}) for s in (0, 1, 2)),
        *(row(f"branches-stage{s}", sdp=BRANCHES, stage=s, family="qwen3") for s in (0, 1, 2)),
        *(row(f"{how}-transport", sdp={"transport": how}, stage=2) for how in ("owner_sets", "all_to_all")),
        *(row(f"three_quarters-stage{s}", sdp={"coverage": 0.75}, stage=s, family="qwen2", clip=1.0) for s in (0, 1)),
        *(row(f"one_kv_head-stage{s}", model=ONE_KV, stage=s, family="qwen3") for s in (0, 2)),
        row("one_large_bucket", bucket=500_000),
        row("bucket_of_one_element", bucket=1, stage=2),
        row("quarter", sdp={"coverage": 0.25}, stage=2, model=BIASES),
        row("everything", sdp={"coverage": 1.0}),
        row("tied-mistral", family="mistral", model=TIED, stage=2, clip=1.0),
        row("layers-three_quarters-tied", sdp={**LAYERS, "coverage": 0.75}, model={"num_hidden_layers": 5, **TIED}),
        row("by_kind", sdp={"coverage": {"mlp": 0.5, "attention": 1.0}}, stage=2),
        row("mlp_only-shared", sdp={"partition": ["mlp"], "shared_modules": ["model.layers.0"]}),
        row("capacity", sdp={"worker_capacity": [4, 1, 1, 1]}, model=BIASES),
        row("3-ranks", world=3, sdp={"owners_per_unit": 2}, stage=2, model=BIASES),
        *(row(f"2-replicas-stage{s}", sdp={"num_subnetworks": 2, "owners_per_unit": 1}, stage=s) for s in (0, 1, 2)),
        row("gradient_checkpointing", stage=2, extra={"checkpointing": True}),
        row("frozen_linear", stage=1, extra={"frozen": ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]}),
        row("frozen_embeddings", sdp=LAYERS, extra={"frozen": ["model.embed_tokens.weight"]}),
    ],
)  # fmt: skip
def test_training_equals_the_simulation(pools, values, world):
    check(pools(world), values, world)


def check(pool, values, world):
    results = pool.run("tests.engine.cases:train", timeout=60, **values)
    assert_owners_equal(results)
    module = build_model(values["family"], **{key: values[key] for key in ("model", "frozen") if key in values})
    arguments = {key: values[key] for key in ("sdp", "ds")}
    assert_like(results, simulate(results[0], world=world, module=module, **arguments))
