"""Training on ranks equals the reference simulator: ZeRO stages, clipping, accumulation, buckets, families, plans."""

import itertools

import pytest

from tests.engine.cases import build_model
from tests.support.compare import assert_like, assert_owners_equal, simulate

HALF = {"coverage": 0.5}
CLIP = {"clip": 1.0}  # first norms are about 3.5
TWO = {"num_subnetworks": 2, "coverage": 0.5}
ONE_KV = {"num_key_value_heads": 1}
MHA = {"num_key_value_heads": 8}
TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
BUCKETS = (20_000, 4000)


def row(name, *, stage=1, family="llama", model=None, sdp=HALF, world=4, extra=None, **ds):
    values = {"family": family, "model": model or {}, "sdp": sdp, "ds": {"stage": stage, **ds}, **(extra or {})}
    return pytest.param(values, world, id=name)


ROWS = [
    *(row(f"stage{stage}", stage=stage) for stage in (0, 1, 2, 3)),
    *(
        row(f"stage{stage}-clip-accumulate-tiny_buckets", stage=stage, bucket=4000, accumulation=2, **CLIP)
        for stage in (0, 1, 2, 3)
    ),
    *(
        row(
            f"{transport}-stage{stage}",
            stage=stage,
            bucket=4000,
            sdp={**HALF, "comm": {"transport": transport}},
            **CLIP,
        )
        for transport in ("owner_sets", "all_to_all")
        for stage in (1, 2, 3)
    ),
    *(
        row(
            f"stage3-owner_sets-one_kv_head-{family}",
            stage=3,
            family=family,
            model=ONE_KV,
            bucket=4000,
            sdp={**HALF, "comm": {"transport": "owner_sets"}},
        )
        for family in ("llama", "qwen3")
    ),
    row("stage3-tied-qwen3", stage=3, family="qwen3", model=TIED),
    row("stage3-three_quarters-biases", stage=3, model=BIASES, sdp={"coverage": 0.75}, accumulation=2),
    row("stage3-gradient_checkpointing", stage=3, extra={"checkpointing": True}),
    row("stage3-frozen_embeddings", stage=3, extra={"frozen": ["model.embed_tokens.weight"]}),
    row("stage3-frozen_linear", stage=3, extra={"frozen": ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]}),
    row(
        "stage3-one_layer", stage=3, model={"num_hidden_layers": 1}, sdp={"coverage": 0.5, "plan": {"design": "cyclic"}}
    ),
    row("stage3-shared_first_layer", stage=3, sdp={**HALF, "shared_modules": ["model.layers.0"]}),
    row("accumulate", stage=2, accumulation=2),
    row("buckets-20000", stage=2, bucket=20_000),
    row("bucket-of-one-element", stage=1, bucket=1),
    row("mistral-tied-clip", family="mistral", model=TIED, **CLIP),
    row("qwen2-tiny_buckets", family="qwen2", stage=2, bucket=4000),
    row("qwen3-tied", family="qwen3", stage=0, model=TIED),
    row("qwen3-mha", family="qwen3", stage=2, model=MHA, bucket=4000),
    row("biases-accumulate", stage=2, model=BIASES, accumulation=2, bucket=4000),
    row("biases-full_scale", stage=1, model=BIASES, sdp={**HALF, "output_scaling": "inverse_coverage"}),
    row("no_scale", stage=2, sdp={**HALF, "output_scaling": "none"}),
    row("quarter", stage=2, sdp={"coverage": 0.25}, bucket=4000),
    row("quarter-qwen2", stage=1, family="qwen2", sdp={"coverage": 0.25}, **CLIP),
    row("three_quarters", stage=1, sdp={"coverage": 0.75}, bucket=4000),
    row("three_quarters-biases", stage=2, model={**BIASES, **MHA}, sdp={"coverage": 0.75}, bucket=4000, **CLIP),
    row(
        "three_quarters-qwen3",
        stage=0,
        family="qwen3",
        sdp={"coverage": 0.75, "plan": {"chunk_multiple": 1}},
    ),
    row("mlp_only", stage=2, sdp={**HALF, "partition": ["mlp"]}, bucket=4000),
    row("attention_only", stage=1, sdp={**HALF, "partition": ["attention"]}),
    row("shared_first_layer", stage=2, sdp={**HALF, "shared_modules": ["model.layers.0", "*.1.mlp"]}, bucket=4000),
    row("owners_per_unit", stage=1, sdp={"coverage": 0.75, "plan": {"design": "cyclic"}}),
    row("random_design", stage=2, sdp={**HALF, "plan": {"design": "random", "seed": 7}}, bucket=4000),
    row("3-ranks-2-owners", stage=1, world=3, sdp={"coverage": "2/3"}, bucket=4000),
    row("3-ranks-two_thirds", stage=2, world=3, family="qwen2", sdp={"coverage": 0.6667}, accumulation=2, **CLIP),
    row("3-ranks-stage0", stage=0, world=3, model=BIASES, sdp={"coverage": "2/3"}),
    *(
        row(
            f"2-replicas-stage{stage}",
            stage=stage,
            sdp=TWO,
            bucket=4000,
            **CLIP,
        )
        for stage in (0, 1, 2, 3)
    ),
    row("2-replicas-dense", stage=1, sdp={"num_subnetworks": 2, "coverage": 1.0}),
    *(
        row(
            f"2-replicas-{transport}-stage{stage}",
            stage=stage,
            sdp={**TWO, "comm": {"transport": transport}},
            bucket=4000,
        )
        for transport in ("owner_sets", "all_to_all")
        for stage in (1, 2, 3)
    ),
    row(
        "2-replicas-round_robin",
        stage=2,
        sdp={**TWO, "plan": {"rank_order": "round_robin"}},
        bucket=4000,
    ),
    row("one_subnetwork", stage=2, sdp={"num_subnetworks": 1, "coverage": 1.0}),
    row("one_kv_head", stage=1, model=ONE_KV, bucket=4000),
    row("one_kv_head-tied", stage=1, family="mistral", model={**ONE_KV, **TIED}),
    row("one_kv_head-qwen2", stage=0, family="qwen2", model=ONE_KV),
    row("one_kv_head-qwen3", stage=2, family="qwen3", model=ONE_KV, bucket=4000),
    row("one_kv_head-biases", stage=2, model={**ONE_KV, **BIASES}, bucket=4000, **CLIP),
    row("one_kv_head-quarter", stage=1, family="qwen3", model=ONE_KV, sdp={"coverage": 0.25}),
    row("one_layer", stage=1, model={"num_hidden_layers": 1}, sdp={"coverage": 0.5, "plan": {"design": "cyclic"}}),
    row("fewer_neurons_than_workers", stage=2, model={"intermediate_size": 2}, bucket=4000),
    row("gradient_checkpointing", stage=2, bucket=4000, extra={"checkpointing": True}),
    row("frozen_embeddings", stage=1, bucket=4000, extra={"frozen": ["model.embed_tokens.weight"]}),
    row(
        "frozen_shared",
        stage=2,
        extra={"frozen": [n for n, _ in build_model().named_parameters() if "_proj" not in n]},
    ),
    row("frozen_linear", stage=2, extra={"frozen": ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]}, **CLIP),
]


@pytest.mark.parametrize(("values", "world"), ROWS)
def test_training_equals_the_simulation(pools, values, world):
    check(pools(world), values, world)


PRODUCT = [
    row(
        f"{arch}-stage{stage}-coverage{coverage}-bucket{bucket}{'-clip' * bool(clip)}-{accumulation}-{scaling}",
        family=family,
        model=model,
        stage=stage,
        bucket=bucket,
        accumulation=accumulation,
        clip=clip,
        sdp={"coverage": coverage, "output_scaling": scaling},
    )
    for (arch, family, model), stage, coverage, bucket, (clip, accumulation), scaling in itertools.product(
        [
            ("llama", "llama", MHA),
            ("llama-gqa-tied", "llama", TIED),
            ("llama-biases", "llama", BIASES),
            ("mistral", "mistral", {}),
            ("qwen2-tied", "qwen2", TIED),
            ("qwen3", "qwen3", {}),
            ("qwen3-one_kv", "qwen3", ONE_KV),
        ],
        (0, 1, 2, 3),
        (0.25, 0.5, 0.75),
        BUCKETS,
        ((0.0, 1), (1.0, 2)),
        ("none", "inverse_sqrt_coverage", "inverse_coverage"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("values", "world"), PRODUCT)
def test_every_combination_equals_the_simulation(pools, values, world):
    check(pools(world), values, world)


SHARING = [
    (stage, transport, masking)
    for stage in range(4)
    for transport in ("owner_sets", "all_to_all")
    for masking in ("forward", "backward")
    # The rest is refused.
    if (stage, transport) != (0, "all_to_all") and (stage, masking) != (3, "backward")
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "transport", "masking"), SHARING)
def test_replicas_of_workers_that_share_equal_the_simulation(pools, stage, transport, masking):
    """Three workers, two owners of each unit, two replicas of each worker."""
    sdp = {
        "num_subnetworks": 3,
        "coverage": "2/3",
        "comm": {"transport": transport},
        "masking": masking,
    }
    check(pools(6), row("", stage=stage, world=6, sdp=sdp, bucket=4000, **CLIP).values[0], 6)


def check(pool, values, world):
    results = pool.run("tests.engine.cases:train", timeout=60, **values)
    assert_owners_equal(results)
    module = build_model(values["family"], **{key: values[key] for key in ("model", "frozen") if key in values})
    arguments = {key: values[key] for key in ("sdp", "ds")}
    assert_like(results, simulate(results[0], world=world, module=module, **arguments))
    if values["ds"].get("clip"):
        assert all(norm > values["ds"]["clip"] for norm in results[0]["norms"]), "the clip value must clip"
