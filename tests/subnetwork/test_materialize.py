"""Models built on the meta device: one full model for every plan, drawn as the family draws it, in little memory."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.plan import make_plan
from deepspeed_sdp.subnetwork import cut_model, is_meta, materialize
from tests.support.models import FAMILIES, tiny_config, tiny_model
from tests.support.ranks import rank_environment

SIZES = {"num_key_value_heads": 2, "attention_bias": True}


def union(family="llama", workers=4, owners=2, partition=("mlp", "attention"), seed=0, dtype=None, **options):
    """The full model put together from all workers' subnetworks, checked to agree to the bit; and rank 0's buffers."""
    sizes = {**SIZES, **options.pop("sizes", {})}
    full, buffers = {}, None
    shapes = {name: p.shape for name, p in tiny_model(family, meta=True, **sizes).named_parameters()}
    for worker in range(workers):
        model = tiny_model(family, meta=True, **sizes)
        if dtype:
            model = model.to(dtype)
        spaces = [module.space for module in find_adapter(model).partitioned_modules(model, partition)]
        plan = make_plan(spaces, workers, owners_per_unit=owners, **options)
        cut = cut_model(model, plan, worker)
        materialize(cut, "cpu", seed)
        assert not is_meta(model)
        for name, p in cut.module.named_parameters():
            fragment = cut.fragments[name]
            whole = full.setdefault(
                fragment.full_name, torch.full(shapes[fragment.full_name], torch.nan, dtype=p.dtype)
            )
            if fragment.dim is not None:
                whole = whole.narrow(fragment.dim, fragment.start, fragment.stop - fragment.start)
            assert torch.isnan(whole).all() or torch.equal(whole, p.detach()), f"{name} differs between workers"
            whole.copy_(p.detach())
        mine = dict(cut.module.named_buffers())
        buffers = buffers or mine
        assert all(torch.equal(value, buffers[name]) for name, value in mine.items())
    assert set(full) == set(shapes)
    assert not any(torch.isnan(value).any() for value in full.values())
    return full, buffers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_gives_the_same_full_model(family):
    expected, _ = union(family, 1, 1)
    plans = [
        {"workers": 4, "owners": 2},
        {"workers": 4, "owners": 3, "chunk_multiple": 1},
        {"workers": 5, "owners": 2},
        {"workers": 3, "owners": 2, "partition": ("mlp",)},
        {"workers": 4, "owners": 4},
        {"workers": 4, "owners": 3, "partition": ("attention",), "design": "cyclic"},
        {"workers": 4, "owners": 2, "design": "random"},
        {"workers": 2, "owners": 1},
    ]
    for plan in plans:
        full, _ = union(family, **plan)
        for name, value in full.items():
            assert torch.equal(value, expected[name]), f"{name} with {plan}"


def test_absent_modules_and_ties_too():
    sizes = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    expected, _ = union("qwen3", 1, 1, sizes=sizes)
    full, _ = union("qwen3", 4, 2, sizes=sizes)
    assert all(torch.equal(value, expected[name]) for name, value in full.items())
    assert "lm_head.weight" not in full


def test_the_seed_and_the_place_matter():
    first, _ = union(seed=0)
    second, _ = union(seed=1)
    weights = [name for name, value in first.items() if value.dim() == 2]
    assert all(not torch.equal(first[name], second[name]) for name in weights)
    for name, other in itertools.combinations(weights, 2):
        if first[name].shape == first[other].shape:
            assert not torch.equal(first[name], first[other]), f"{name} and {other} hold the same values"
    gate = first["model.layers.0.mlp.gate_proj.weight"]
    assert len(torch.unique(gate, dim=0)) == len(gate), "two units hold the same values"
    up, down = first["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.down_proj.weight"]
    assert abs(float(torch.corrcoef(torch.stack([gate.flatten(), up.flatten(), down.T.flatten()]))[0, 1:].max())) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_values_are_distributed_as_the_family_draws_them(family, dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 100, "vocab_size": 200, "initializer_range": 0.05}
    full, buffers = union(family, sizes=sizes, dtype=dtype)
    assert {value.dtype for value in full.values()} == {dtype or torch.float32}
    for name, value in full.items():
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            noise = 4 / value.numel() ** 0.5
            assert float(value.float().std()) == pytest.approx(0.05, rel=noise), name
            assert abs(float(value.float().mean())) < 0.05 * noise, name
    reference = dict(FAMILIES[family][1](tiny_config(family, **SIZES, **sizes)).named_buffers())
    assert set(buffers) == set(reference)
    for name, value in buffers.items():
        torch.testing.assert_close(value.float(), reference[name].float(), rtol=8e-3 if dtype else 0, atol=0)


def test_the_global_generator_is_left_alone():
    model = tiny_model(meta=True)
    spaces = [module.space for module in find_adapter(model).partitioned_modules(model, ("mlp",))]
    cut = cut_model(model, make_plan(spaces, 2, owners_per_unit=1), 0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    materialize(cut, "cpu")
    assert torch.equal(torch.rand(4), expected)


def test_a_family_that_leaves_a_value_out_is_named():
    model = tiny_model(meta=True)
    model._init_weights = lambda module: None
    spaces = [module.space for module in find_adapter(model).partitioned_modules(model, ("mlp",))]
    cut = cut_model(model, make_plan(spaces, 2, owners_per_unit=1), 0)
    with pytest.raises(ModelError, match=r"gives parameter model\.embed_tokens\.weight no value"):
        materialize(cut, "cpu")


def test_half_a_meta_model_is_refused():
    model = tiny_model(meta=True)
    model.lm_head = torch.nn.Linear(32, 97, bias=False)
    with pytest.raises(ModelError, match="is on the meta device and other parameters are not"):
        is_meta(model)


PEAK = """
import json, resource, sys
import torch
from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.plan import make_plan
from deepspeed_sdp.subnetwork import cut_model, materialize
from tests.support.models import tiny_model

def build(workers, owners, **sizes):
    model = tiny_model(meta=True, **sizes)
    full = sum(p.numel() for p in model.parameters()) * 4
    spaces = [module.space for module in find_adapter(model).partitioned_modules(model, ("mlp", "attention"))]
    cut = cut_model(model, make_plan(spaces, workers, owners_per_unit=owners), 0)
    materialize(cut, "cpu")
    return full, cut

build(4, 1)  # lazy imports and allocator pools
# The imports peaked above what is in use now: fill up to that peak, so that every further byte raises it.
in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ballast = b"1" * (max(peak - in_use, 0) * 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
full, cut = build(4, 1, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8,
                  num_key_value_heads=8, head_dim=64, vocab_size=1000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"full": full, "owned": cut.owned_numel * 4, "raised": (after - before) * 1024}))
"""


def test_only_what_is_owned_takes_host_memory():
    done = subprocess.run(
        [sys.executable, "-c", PEAK], env=rank_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["full"] > 150e6
    assert report["owned"] < 0.3 * report["full"]
    assert 0.5 * report["owned"] < report["raised"] < 1.3 * report["owned"] + 8e6, report
    assert report["raised"] < 0.45 * report["full"], report


def test_the_full_models_skeleton_is_built_once(monkeypatch):
    model = tiny_model("gpt2", meta=True, num_hidden_layers=40)
    spaces = [module.space for module in find_adapter(model).partitioned_modules(model, ("mlp", "attention"))]
    cut = cut_model(model, make_plan(spaces, 4, owners_per_unit=2), 0)
    built = []
    initialise = type(model).__init__
    monkeypatch.setattr(type(model), "__init__", lambda self, config: built.append(self) or initialise(self, config))
    materialize(cut, "cpu")
    assert len(built) == 1
    assert cut.full.new_skeleton() is not cut.full.skeleton is built[0]


def test_what_a_subnetwork_is_does_not_change():
    model = tiny_model(meta=True)
    spaces = [module.space for module in find_adapter(model).partitioned_modules(model, ("mlp",))]
    cut = cut_model(model, make_plan(spaces, 2, owners_per_unit=1), 0)
    with pytest.raises(AttributeError):
        cut.index = 1
    with pytest.raises(TypeError):
        cut.fragments["lm_head.weight"] = None
