"""Cutting, in one process and without torch.distributed: cover, shapes, and the masked loss."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.errors import ConfigError, ModelError, PlanError
from deepspeed_sdp.plan import make_plan
from deepspeed_sdp.subnetwork import cut_model, plan_for, unit_spaces
from tests.support.compare import SCALES
from tests.support.models import tiny_model
from tests.support.oracle import only_units_of, unit_owners_of


def plan_of(model, workers, owners, partition=("mlp", "attention"), **options):
    spaces = [module.space for module in find_adapter(model).partitioned_modules(model, partition)]
    return make_plan(spaces, workers, owners_per_unit=owners, **options)


@st.composite
def jobs(draw):
    workers = draw(st.integers(1, 6))
    owners = draw(st.integers(1, workers))
    heads = draw(st.sampled_from([1, 2, 3, 6]))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    model = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.sampled_from([1, 3, 17, 40])),
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": heads,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family == "llama":
        model.update(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    options = {
        "design": draw(st.sampled_from(["auto", "cyclic", "random"])),
        "chunk_multiple": draw(st.sampled_from([1, 4, 64])),
        "partition": draw(st.sampled_from([("mlp",), ("attention",), ("mlp", "attention")])),
    }
    return family, model, workers, owners, options, draw(st.sampled_from(sorted(SCALES)))


def cut_all(job):
    family, sizes, workers, owners, options, scaling = job
    full = tiny_model(family, **sizes)
    try:
        plan = plan_of(full, workers, owners, **options)
    except PlanError:
        reject()
    return (
        full,
        plan,
        [cut_model(tiny_model(family, **sizes), plan, w, output_scaling=scaling) for w in range(workers)],
        plan.coverage ** -SCALES[scaling],
    )


@settings(max_examples=40)
@given(jobs())
def test_the_union_of_all_workers_is_the_full_model(job):
    full, plan, cuts, _ = cut_all(job)
    seen = {name: torch.zeros(p.shape, dtype=torch.long) for name, p in full.named_parameters()}
    expected = dict(full.named_parameters())
    for worker, cut in enumerate(cuts):
        parameters = dict(cut.module.named_parameters())
        assert set(parameters) == set(cut.fragments)
        assert cut.owned_numel == sum(p.numel() for p in parameters.values())
        for name, p in parameters.items():
            fragment = cut.fragments[name]
            whole, count = expected[fragment.full_name], seen[fragment.full_name]
            if fragment.dim is not None:
                assert worker in plan.owner_sets[fragment.owner_set]
                whole = whole.narrow(fragment.dim, fragment.start, fragment.stop - fragment.start)
                count = count.narrow(fragment.dim, fragment.start, fragment.stop - fragment.start)
            assert torch.equal(p, whole), name
            count += 1
    partitioned = {name for cut in cuts for name in cut.partitioned}
    for name, count in seen.items():
        assert (count == (plan.owners_per_unit if name in partitioned else plan.num_subnetworks)).all(), name


@settings(max_examples=40)
@given(jobs(), st.integers(0, 1000))
def test_a_cut_models_loss_and_gradients_are_the_masked_models(job, seed):
    full, plan, cuts, scale = cut_all(job)
    ids = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(seed))
    for worker, cut in enumerate(cuts):
        full.zero_grad()
        with only_units_of(full, unit_owners_of(plan), worker, scale):
            expected = full(input_ids=ids, labels=ids).loss
            expected.backward()
        loss = cut.module(input_ids=ids, labels=ids).loss
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=2e-6)
        for name, p in cut.module.named_parameters():
            fragment = cut.fragments[name]
            gradient = full.get_parameter(fragment.full_name).grad
            if fragment.dim is not None:
                gradient = gradient.narrow(fragment.dim, fragment.start, fragment.stop - fragment.start)
            mine = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(mine, gradient, atol=2e-6, rtol=1e-4)


def test_a_worker_holds_its_share_of_memory_and_no_view_of_the_rest():
    full = tiny_model(intermediate_size=64)
    plan = plan_of(full, 4, 2)
    total = sum(p.numel() for p in full.parameters())
    cut = cut_model(full, plan, 0)
    assert cut.owned_numel == total - plan.total_numel + plan.owned_numel(0)
    assert plan.owned_numel(0) == plan.total_numel // 2
    for name, p in cut.module.named_parameters():
        assert p.untyped_storage().nbytes() == p.numel() * 4, f"{name} keeps a larger storage alive"


def test_positions_are_equal_on_all_workers():
    plan = plan_of(tiny_model(), 4, 3)
    known = {}
    for worker in range(4):
        cut = cut_model(tiny_model(), plan, worker)
        positions = cut.positions()
        assert len(set(positions.values())) == len(positions)
        for name, position in positions.items():
            fragment = cut.fragments[name]
            assert known.setdefault((fragment.full_name, fragment.start), position) == position


@pytest.mark.parametrize("sizes", [{"intermediate_size": 54}, {"num_key_value_heads": 8}, {"num_hidden_layers": 2}])
def test_a_plan_of_another_model_is_refused(sizes):
    plan = plan_of(tiny_model(), 4, 2)
    with pytest.raises(ModelError, match=r"plan: made for model\.layers"):
        cut_model(tiny_model(**sizes), plan, 0)


def test_shared_modules():
    model = tiny_model()
    adapter = find_adapter(model)

    def left(*patterns):
        return [space.name for space in unit_spaces(model, SDPConfig(shared_modules=patterns), adapter)]

    assert left("model.layers.0") == [f"model.layers.{i}.{part}" for i in (1, 2) for part in ("self_attn", "mlp")]
    assert left("*.self_attn", "model.layers.2") == ["model.layers.0.mlp", "model.layers.1.mlp"]
    with pytest.raises(ConfigError, match="'nothing', which matches no module"):
        left("nothing")
    with pytest.raises(ConfigError, match="shares every unit"):
        left("model")


def test_a_pattern_inside_a_block_is_refused():
    model = tiny_model()
    config = SDPConfig(granularity="layer", shared_modules=("model.layers.0.mlp",))
    with pytest.raises(
        ConfigError, match=r"which matches model\.layers\.0\.mlp, a part of a unit; .*'model\.layers\.0'"
    ):
        unit_spaces(model, config, find_adapter(model))


@pytest.mark.parametrize("granularity", ["neuron", "branch", "layer"])
def test_the_ends_can_be_everybodys(granularity):
    model = tiny_model(num_hidden_layers=8)
    plan = plan_for(model, {"granularity": granularity, "share_ends": 2}, 4)
    assert {space.space.name.split(".")[2] for space in plan.spaces} == {"2", "3", "4", "5"}
    with pytest.raises(
        ConfigError, match="share_ends: got 4 with 8 layers, of which none would be left; takes up to 3"
    ):
        plan_for(model, {"share_ends": 4}, 4)


@pytest.mark.parametrize("block_unit", ["layer", "branch"])
def test_blocks_cover_the_model_and_an_absent_one_is_the_identity(block_unit):
    full = tiny_model()
    config = SDPConfig(granularity=block_unit, coverage=0.5)
    spaces = unit_spaces(full, config, find_adapter(full))
    in_layers = sum(p.numel() for p in full.model.layers.parameters())
    assert sum(space.numel for space in spaces) == in_layers
    plan = make_plan(spaces, 2, owners_per_unit=1)
    held = 0
    hidden = torch.randn(1, 5, 32)
    for worker in range(2):
        model = tiny_model()
        cut_model(model, plan, worker, block_unit=block_unit)
        held += sum(p.numel() for p in model.model.layers.parameters())
        for space in spaces:
            if worker not in plan.owners(space.name):
                output = model.get_submodule(space.name)(hidden)
                output = output[0] if isinstance(output, tuple) else output
                assert torch.equal(output, hidden if block_unit == "layer" else torch.zeros_like(hidden))
                assert not list(model.get_submodule(space.name).parameters())
    assert held == in_layers
