"""Another subnetwork in the place of one, inside the same model object."""

import pytest
import torch

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.subnetwork import cut_model, give_memory, graft, plan_for, recut
from tests.support.models import tiny_model

NEURONS = SDPConfig(coverage=0.5, num_subnetworks=4)
LAYERS = SDPConfig(coverage=0.5, num_subnetworks=4, granularity="layer")


def keys(sdp):
    return {"masking": sdp.masking, "output_scaling": sdp.output_scaling, "block_unit": sdp.block_unit}


def changed(model, before, after, worker=1):
    old = cut_model(model, plan_for(model, before, 4), 0, **keys(before))
    made = recut(old, plan_for(old.full.skeleton, after, 4), worker, recompute_frozen=False, group_of={}, **keys(after))
    made = graft(model, made)
    give_memory(model, lambda _, parameter: torch.zeros(parameter.shape))
    return made


@pytest.mark.parametrize(("before", "after"), [(NEURONS, LAYERS), (LAYERS, NEURONS), (LAYERS, LAYERS)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_it_is_what_cutting_the_full_model_gives(before, after, family):
    model, fresh = tiny_model(family, num_hidden_layers=4), tiny_model(family, num_hidden_layers=4)
    expected = cut_model(fresh, plan_for(fresh, after, 4), 1, **keys(after))
    made = changed(model, before, after)
    assert made.module is model
    assert dict(made.fragments) == dict(expected.fragments)
    shapes = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    for name, buffer in fresh.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
            parameter.copy_(other)
        assert torch.equal(model(ids).logits, fresh(ids).logits), "scales of blocks are there once"


def test_what_a_client_put_on_modules_is_on_the_new_ones():
    model = tiny_model(num_hidden_layers=4)
    model.gradient_checkpointing_enable()
    seen = []
    norm = model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    root = model.register_forward_pre_hook(lambda *_: seen.append("root"))
    changed(model, LAYERS, NEURONS)
    model.train()
    ids = torch.arange(12).reshape(2, 6)
    model(ids)
    assert seen == ["root", "norm"]
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    norm.remove()
    root.remove()
    model(ids)
    assert seen == ["root", "norm"]
    assert all(module.training for module in model.modules())
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_ties_stay_and_frozen_parameters_too():
    model = tiny_model(num_hidden_layers=4, tie_word_embeddings=True)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    changed(model, NEURONS, LAYERS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held = dict(model.named_parameters())
    assert not held.get("model.layers.1.mlp.up_proj.weight", torch.zeros(0)).requires_grad
