"""Block units, coverage by kind, unequal workers, plan files and rank orders, against the reference simulator."""

import pytest

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.plan import SubnetworkPlan, make_plan
from deepspeed_sdp.subnetwork import unit_spaces
from tests.support.compare import assert_like, assert_owners_equal, simulate
from tests.support.models import tiny_model

OWNER_SETS = {"comm": {"transport": "owner_sets"}}
LAYERS = {"granularity": "layer"}
BRANCHES = {"granularity": "branch"}
BIASES = {"attention_bias": True, "mlp_bias": True}


def row(name, *, sdp, stage=1, family="llama", model=None, bucket=4000, **ds):
    values = {"sdp": sdp, "family": family, "model": model or {}, "ds": {"stage": stage, "bucket": bucket, **ds}}
    return pytest.param(values, id=name)


@pytest.mark.parametrize(
    "values",
    [
        *(row(f"layers-stage{stage}", sdp=LAYERS, stage=stage, model={"num_hidden_layers": 5}) for stage in range(4)),
        *(row(f"branches-stage{stage}", sdp=BRANCHES, stage=stage) for stage in (0, 1, 2, 3)),
        row("layers-7-clip-accumulate", sdp=LAYERS, stage=2, model={"num_hidden_layers": 7}, clip=1.0, accumulation=2),
        row("layers-three_quarters", sdp={**LAYERS, "coverage": 0.75}, model={"num_hidden_layers": 5}),
        row("layers-shared", sdp={**LAYERS, "shared_modules": ["model.layers.0"]}, model={"num_hidden_layers": 5}),
        row("layers-no_scale", sdp={**LAYERS, "output_scaling": "none"}, stage=2, model={"num_hidden_layers": 4}),
        row("branches-qwen3-biases", sdp=BRANCHES, stage=2, family="qwen3", model={"attention_bias": True}),
        row("branches-biases-full_scale", sdp={**BRANCHES, "output_scaling": "inverse_coverage"}, model=BIASES),
        row("branches-mlp_only", sdp={**BRANCHES, "partition": ["mlp"]}, model={"num_hidden_layers": 4}),
        row("branches-by_kind", sdp={**BRANCHES, "coverage": {"mlp": 0.5, "attention": 0.75}}, stage=2),
        row("layers-tied-mistral", sdp=LAYERS, family="mistral", model={"tie_word_embeddings": True}),
        row("layers-qwen2", sdp=LAYERS, family="qwen2", model={"num_hidden_layers": 4}),
        row("layers-stage3-checkpoint-clip", sdp={**LAYERS, "coverage": 0.75}, stage=3, clip=1.0, accumulation=2),
        row("layers-owner_sets", sdp={**LAYERS, **OWNER_SETS}, stage=3, model={"num_hidden_layers": 7}),
        *(
            row(f"layers-quarter-{how}-stage{s}", sdp={**LAYERS, "coverage": 0.25, "comm": {"transport": how}}, stage=s,
                model={"num_hidden_layers": 4})
            for how in ("owner_sets", "all_to_all") for s in (1, 2)
        ),
        row("by_kind-stage3", sdp={"coverage": {"mlp": 0.5, "attention": 0.75}}, stage=3),
        row("by_kind", sdp={"coverage": {"mlp": 0.5, "attention": 0.75}}, stage=2),
        row("owners_by_kind", sdp={"coverage": {"mlp": 0.75, "attention": 1.0}}),
        row("capacity", sdp={"plan": {"worker_capacity": [1, 1, 0.5, 0.5]}}, stage=2),
        row("capacity-stage0", sdp={"plan": {"worker_capacity": [1, 1, 0.5, 0.5]}}, stage=0, model=BIASES, clip=1.0),
        row("capacity-saturated", sdp={"plan": {"worker_capacity": [4, 1, 1, 1]}}, model={"num_hidden_layers": 4}),
    ],
)  # fmt: skip
def test_units_train_like_the_simulation(values, ranks4):
    results = ranks4.run("tests.engine.cases:train", **values)
    assert_like(results, simulate(results[0], **values))
    assert_owners_equal(results)


def test_a_dropped_layer_takes_no_memory(ranks4):
    results = ranks4.run("tests.engine.cases:train", sdp=LAYERS, model={"num_hidden_layers": 4}, steps=1)
    for rank, result in enumerate(results):
        plan = SubnetworkPlan.from_json(result["plan"])
        owned = {f"model.layers.{i}" for i in range(4) if rank in plan.owners(f"model.layers.{i}")}
        assert len(owned) == 2
        held = {name.rsplit(".", 3)[0] for name in result["owned"] if ".layers." in name and "_proj" in name}
        assert held == owned


@pytest.mark.parametrize("order", ["owners_within_node", "owners_across_nodes"])
def test_rank_orders_train_like_the_simulation(order, ranks4):
    values = {
        "sdp": {"num_subnetworks": 2, "coverage": 0.5, "plan": {"rank_order": order}},
        "ds": {"stage": 1},
    }
    results = ranks4.run("tests.engine.cases:on_nodes", on_rank="tests.engine.cases:train", ranks_per_node=2, **values)
    expected = {"owners_within_node": [0, 1, 0, 1], "owners_across_nodes": [0, 0, 1, 1]}[order]
    assert results[0]["workers"] == expected
    assert_like(results, simulate(results[0], **values))
    assert_owners_equal(results)


def test_a_plan_file_is_trained_as_it_stands(ranks4, tmp_path):
    spaces = unit_spaces(tiny_model(), SDPConfig(), find_adapter(tiny_model()))
    plan = make_plan(spaces, 4, owners_per_unit=3, design="random", seed=5)
    (tmp_path / "plan.json").write_text(plan.to_json())
    values = {"sdp": {"plan": {"file": str(tmp_path / "plan.json")}}, "ds": {"stage": 2}}
    results = ranks4.run("tests.engine.cases:train", **values)
    assert SubnetworkPlan.from_json(results[0]["plan"]).hash == plan.hash
    assert_like(results, simulate(results[0], **values))
