"""What the Llama adapter says about models, and which models it does not know."""

import pytest
import torch
import transformers
from torch import nn

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.errors import ModelError
from tests.support.models import FAMILIES, tiny_model

GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 50, "n_positions": 8}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("biases", [False, True])
def test_units_add_up_to_what_can_be_partitioned(family, kv_heads, biases):
    extra = {"attention_bias": biases, "mlp_bias": biases} if family == "llama" else {}
    model = tiny_model(family, meta=True, num_key_value_heads=kv_heads, **extra)
    modules = find_adapter(model).partitioned_modules(model, ("mlp", "attention"))
    assert [m.space.name for m in modules] == [
        f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")
    ]
    assert [m.space.layer for m in modules] == [0, 0, 1, 1, 2, 2]
    for module in modules:
        units = {"attention": kv_heads, "mlp": 53}[module.space.kind]
        assert module.space.num_units == units
        numel = 0
        for tensor in module.tensors:
            parameter = model.get_parameter(tensor.name)
            assert parameter.shape[tensor.dim] == units * tensor.width
            assert tensor.is_write == tensor.name.endswith(("o_proj.weight", "down_proj.weight"))
            numel += parameter.numel()
        assert module.space.numel == numel


def test_kinds():
    model = tiny_model(meta=True)
    adapter = find_adapter(model)
    assert {m.space.kind for m in adapter.partitioned_modules(model, ("mlp",))} == {"mlp"}
    assert {m.space.kind for m in adapter.partitioned_modules(model, ("attention",))} == {"attention"}
    assert [module for _, module in adapter.layers(model)] == list(model.model.layers)


def test_unknown_models_are_refused_with_the_known_families():
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    other = tiny_model(meta=True)
    other.model.layers[1].mlp.up_proj = nn.Bilinear(2, 2, 2)
    for model in (bloom, nn.Linear(1, 1), other):
        with pytest.raises(
            ModelError, match=rf"no adapter knows {type(model).__name__}; .*Llama, Mistral, Qwen2, Qwen3, Gemma.*gpt2"
        ):
            find_adapter(model)


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT2, multi_query=False)),
        lambda: transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT2, multi_query=True)),
        lambda: transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**GPT2)),
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, add_cross_attention=True)),
    ],
    ids=["bigcode", "bigcode-mqa", "imagegpt", "cross-attention"],
)
def test_what_only_looks_like_gpt2_is_refused(model):
    with torch.device("meta"):
        made = model()
    with pytest.raises(ModelError, match="no adapter knows"):
        find_adapter(made)


def test_broken_head_sizes_are_named():
    model = tiny_model(meta=True)
    model.model.layers[2].self_attn.k_proj = nn.Linear(32, 15, device="meta")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn: q_proj has 32 and k_proj 15 outputs"):
        find_adapter(model).partitioned_modules(model, ("attention",))


@pytest.mark.parametrize("name", ["Gemma2", "Olmo2", "Cohere", "StableLm"])
def test_families_with_the_same_names_and_another_shape_are_refused(name):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(ModelError, match=f"no adapter knows {name}ForCausalLM"):
        find_adapter(model)
