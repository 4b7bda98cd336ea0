"""Backward masking on ranks: the dense forward pass, owned gradients, and weights that are never stale."""

import pytest
import torch

from deepspeed_sdp.plan import SubnetworkPlan
from tests.engine.cases import build_model
from tests.engine.test_against_oracle import check
from tests.engine.test_stats import check_traffic

ALL_TO_ALL = {"comm": {"transport": "all_to_all"}}
LAYERS = {"granularity": "layer"}
BRANCHES = {"granularity": "branch"}
ONE_KV = {"num_key_value_heads": 1}
OVERLAPPED = {"backward": {"overlap_refresh": True}}
RECOMPUTED = {"backward": {"recompute_frozen": True}}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


def row(name, *, sdp=None, stage=1, family="llama", model=None, bucket=4000, world=4, extra=None, **ds):
    sdp = {"masking": "backward", "coverage": 0.5, **(sdp or {})}
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
        *(row(f"{how}-transport", sdp={"comm": {"transport": how}}, stage=2) for how in ("owner_sets", "all_to_all")),
        *(row(f"three_quarters-stage{s}", sdp={"coverage": 0.75}, stage=s, family="qwen2", clip=1.0) for s in (0, 1)),
        *(row(f"one_kv_head-stage{s}", model=ONE_KV, stage=s, family="qwen3") for s in (0, 2)),
        row("layers-recomputed", sdp={**LAYERS, **RECOMPUTED}, model={"num_hidden_layers": 4}),
        row("branches-recomputed", sdp={**BRANCHES, **RECOMPUTED}, extra={"checkpointing": True}),
        *(row(f"overlapped-stage{s}", sdp=OVERLAPPED, stage=s, accumulation=2) for s in (0, 1, 2)),
        row("overlapped-layers", sdp={**LAYERS, **OVERLAPPED}, model={"num_hidden_layers": 5, **TIED}),
        row("overlapped-checkpointing", sdp=OVERLAPPED, stage=2, extra={"checkpointing": True}),
        row("overlapped-one_bucket", sdp=OVERLAPPED, bucket=500_000),
        row("layers-quarter-all_to_all", sdp={**LAYERS, "coverage": 0.25, **ALL_TO_ALL}, stage=2),
        row("one_large_bucket", bucket=500_000),
        row("bucket_of_one_element", bucket=1, stage=2),
        row("quarter", sdp={"coverage": 0.25}, stage=2, model=BIASES),
        row("everything", sdp={"coverage": 1.0}),
        row("tied-mistral", family="mistral", model=TIED, stage=2, clip=1.0),
        row("layers-three_quarters-tied", sdp={**LAYERS, "coverage": 0.75}, model={"num_hidden_layers": 5, **TIED}),
        row("by_kind", sdp={"coverage": {"mlp": 0.5, "attention": 1.0}}, stage=2),
        row("mlp_only-shared", sdp={"partition": ["mlp"], "shared_modules": ["model.layers.0"]}),
        row("capacity", sdp={"plan": {"worker_capacity": [4, 1, 1, 1]}}, model=BIASES),
        row("3-ranks", world=3, sdp={"coverage": "2/3"}, stage=2, model=BIASES),
        *(row(f"2-replicas-stage{s}", sdp={"num_subnetworks": 2, "coverage": 0.5}, stage=s) for s in (0, 1, 2)),
        row("gradient_checkpointing", stage=2, extra={"checkpointing": True}),
        row("frozen_linear", stage=1, extra={"frozen": ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]}),
        row("frozen_embeddings", sdp=LAYERS, extra={"frozen": ["model.embed_tokens.weight"]}),
    ],
)  # fmt: skip
def test_training_equals_the_simulation(pools, values, world):
    check(pools(world), values, world)


@pytest.mark.parametrize(
    ("sdp", "stage", "model"),
    [
        ({"coverage": 0.5}, 1, {}),
        ({"coverage": 0.75}, 0, BIASES),
        ({"coverage": 0.25, **LAYERS}, 2, {"num_hidden_layers": 4}),
        ({"coverage": 0.5, **BRANCHES}, 1, {}),
    ],
    ids=["half", "three_quarters-biases", "quarter-layers", "half-branches"],
)
def test_the_gradient_is_unbiased(ranks4, sdp, stage, model):
    """Over all rotations of the plan against the workers (here: of the batches) its mean is the dense gradient."""
    values = {"stage": stage, "model": model}
    dense = ranks4.run("tests.engine.backward_cases:gradient", rotation=0, sdp={"coverage": 1.0}, **values)[0]
    sdp = {"masking": "backward", **sdp}
    rotated = [ranks4.run("tests.engine.backward_cases:gradient", rotation=r, sdp=sdp, **values)[0] for r in range(4)]
    for name, expected in dense.items():
        mean = torch.stack([gradient[name] for gradient in rotated]).mean(0)
        assert float((mean - expected).abs().max()) < 1e-6, name
    assert any(float((rotated[0][name] - dense[name]).abs().max()) > 1e-3 for name in dense), "one of them is not"


@pytest.mark.parametrize(
    ("family", "sdp"),
    [("llama", {"coverage": 0.75}), ("qwen2", {}), ("qwen3", LAYERS), ("mistral", BRANCHES)],
    ids=["llama-chunks", "qwen2", "qwen3-layers", "mistral-branches"],
)
def test_the_forward_pass_is_the_full_models_to_the_bit(ranks4, family, sdp):
    sdp = {"masking": "backward", "coverage": 0.5, **sdp}
    results = ranks4.run("tests.engine.backward_cases:forward_bits", sdp=sdp, family=family)
    full = build_model(family)
    full.load_state_dict(results[0]["full"])
    expected = full(input_ids=results[0]["ids"]).logits
    for result in results:
        assert torch.equal(result["logits"], expected)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "coverage", [0.5, pytest.param(0.25, marks=pytest.mark.slow), pytest.param(0.75, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("units", [{}, LAYERS], ids=["neuron", "layer"])
def test_costs_are_those_of_the_design(ranks4, units, coverage, stage):
    ds = {"stage": stage, "bf16": True}
    model = {"num_hidden_layers": 4, "num_key_value_heads": 8, "intermediate_size": 64}
    values = {"ds": ds, "model": model}
    sdp = {"masking": "backward", "coverage": coverage, **units}
    results = ranks4.run("tests.engine.backward_cases:costs", sdp=sdp, **values)
    dense = ranks4.run("tests.engine.backward_cases:costs", sdp={"coverage": 1.0}, **values)[0]
    plan = SubnetworkPlan.from_json(results[0]["plan"])
    partitioned = sum(p.numel() for n, p in build_model(model=model).named_parameters() if "_proj" in n)
    tokens = 2 * 12
    for result in results:
        check_traffic(result["seen"], result["stats"])
        # Weight gradients of what is not owned: 2 of 6.
        saved = 2 * tokens * partitioned * (1 - coverage)
        assert result["flops"] == dense["flops"] - saved
        check_bytes(result, dense, plan, ds)
        check_refresh(result, plan, stage)


def check_bytes(result, dense, plan, ds):
    """Weights whole; gradients and state of what is owned alone."""
    held, dense_held = result["stats"]["model_state_bytes"], dense["stats"]["model_state_bytes"]
    padding = 2 * 8 * 4 * len(result["buckets"])
    assert held["weights"] == pytest.approx(dense_held["weights"], abs=padding)
    states = sum(
        value.numel() / (len(plan.owner_sets[fragment.owner_set]) if ds["stage"] else 1)
        for fragment, value in result["owned"].values()
    )
    # Two moments and the master, fp32; a step counter for each bucket.
    assert 0 <= held["optimizer"] - 12 * states <= len(result["buckets"]) * (12 * 8 + 4)
    owned = sum(value.numel() for _, value in result["owned"].values())
    assert result["stats"]["owned_numel"] == owned < dense["stats"]["owned_numel"]
    share = owned / dense["stats"]["owned_numel"]
    # Sharded, the buffers of a collective count too, which are larger beside one owner's small shards.
    assert result["gradient_peak"] <= (1.5 if ds["stage"] else 1.01) * share * dense["gradient_peak"]


def check_refresh(result, plan, stage):
    """An owner sends an equal share of what it owns to those who lack it: at stage 0 they do not own it."""
    sets = [(len(plan.owner_sets[f.owner_set]), v.numel()) for f, v in result["owned"].values() if f.owner_set]
    expected = sum(2 * numel / owners * (3 if stage else 4 - owners) for owners, numel in sets)
    padding = 2 * 8 * 3 * len(result["buckets"])
    assert result["stats"]["bytes_sent_by_kind"]["weight_refresh"] == pytest.approx(expected, rel=0.01, abs=padding)
