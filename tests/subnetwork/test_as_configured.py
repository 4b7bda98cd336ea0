"""What a model has beside its class and config is carried into the full model, or refused."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from transformers import LlamaForCausalLM
from transformers.activations import ACT2FN

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.subnetwork import check_as_configured, cut_model, plan_for
from tests.support.models import tiny_config, tiny_model

MLP, ATTENTION = "model.layers.1.mlp", "model.layers.1.self_attn"


def layer(model):
    return model.model.layers[1]


class Loud(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LowRank(nn.Linear):
    """Adapters beside a weight that belongs to the class, without parameters of their own."""

    def forward(self, x):
        return super().forward(x) + x.mean()


class Checkpointed(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def hook(*_):
    return None


def other_class(cls):
    def change(model):
        linear = layer(model).mlp.up_proj
        linear.__class__ = cls

    return change


def own_forward(model):
    mlp = layer(model).mlp
    mlp.forward = functools.partial(lambda forward, x: 2 * forward(x), mlp.forward)


def set_on(module, name, value):
    def change(model):
        setattr(model.get_submodule(module), name, value)

    return change


def call(name, *arguments):
    """Call a method of the model, or of a module in it."""

    def change(model):
        functools.reduce(getattr, name.split("."), model)(*arguments)

    return change


def in_config(**values):
    def change(model):
        for name, value in values.items():
            setattr(model.config, name, value)

    return change


def in_config_of_a_layer(model):
    other = type(model.config)(**{**model.config.to_dict(), "attention_bias": True})
    layer(model).self_attn.config = other


def other_rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_buffer(model):
    model.model.rotary_emb.register_buffer("extra", torch.ones(2), persistent=False)


def on_layer(method):
    def change(model):
        getattr(layer(model), method)(hook)

    return change


def on_weight(name, method="register_hook"):
    def change(model):
        getattr(model.get_parameter(name), method)(hook)

    return change


REFUSED = [
    pytest.param(on_layer("register_forward_hook"), "model.layers.1 has a forward hook, hook", id="forward-hook"),
    pytest.param(on_layer("register_forward_pre_hook"), "has a forward pre hook", id="pre-hook"),
    pytest.param(on_layer("register_full_backward_hook"), "has a backward hook", id="backward-hook"),
    pytest.param(call("register_forward_hook", hook), "LlamaForCausalLM has a forward hook", id="hook-of-the-model"),
    pytest.param(own_forward, f"{MLP} has a forward of its own", id="forward"),
    pytest.param(other_class(Loud), f"{MLP}.up_proj is Loud, where its config makes Linear", id="linear"),
    pytest.param(other_class(LowRank), f"{MLP}.up_proj is LowRank", id="low-rank"),
    pytest.param(
        lambda m: set_on("model.layers", "1", Checkpointed(layer(m)))(m), "model.layers.1 is Checkpointed", id="wrapper"
    ),
    pytest.param(
        lambda m: set_on("model.layers", "1", torch.compile(layer(m)))(m),
        "model.layers.1 is OptimizedModule",
        id="compiled",
    ),
    pytest.param(
        lambda m: parametrize.register_parametrization(layer(m).mlp.up_proj, "weight", Negative()),
        "mlp.up_proj is ParametrizedLinear",
        id="parametrized",
    ),
    pytest.param(
        lambda m: parametrizations.spectral_norm(m.lm_head), "lm_head is ParametrizedLinear", id="spectral-norm"
    ),
    pytest.param(lambda m: weight_norm(m.lm_head), "lm_head has a forward pre hook, WeightNorm", id="weight-norm"),
    pytest.param(set_on(MLP, "act_fn", ACT2FN["gelu"]), f"{MLP}.act_fn is GELUActivation", id="activation"),
    pytest.param(set_on(MLP, "noise", nn.Dropout(0.1)), f"{MLP}.noise (Dropout) was added to it", id="module"),
    pytest.param(set_on(ATTENTION, "scaling", 0.7), f"{ATTENTION} has scaling 0.7, where", id="scaling"),
    pytest.param(
        set_on(ATTENTION, "is_causal", False), "has is_causal False, where its config makes True", id="causal"
    ),
    pytest.param(set_on("model.norm", "variance_epsilon", 0.1), "has variance_epsilon 0.1", id="eps"),
    pytest.param(in_config(rms_norm_eps=0.1), "where its config makes 0.1", id="eps-in-config"),
    pytest.param(in_config(hidden_act="gelu"), "where its config makes GELUActivation", id="activation-in-config"),
    pytest.param(in_config_of_a_layer, f"{ATTENTION} has config LlamaConfig", id="config-of-a-layer"),
    pytest.param(other_rope, "model.rotary_emb.inv_freq, a buffer that is not saved, has other values", id="rope"),
    pytest.param(other_buffer, "model.rotary_emb.extra was added to it", id="buffer"),
    pytest.param(on_weight(f"{MLP}.up_proj.weight"), "up_proj.weight has a hook on its gradient", id="weight-hook"),
    pytest.param(
        on_weight(f"{MLP}.up_proj.weight", "register_post_accumulate_grad_hook"), "has a hook on its", id="grad-hook"
    ),
    pytest.param(
        lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight), "has other parameters than", id="tied"
    ),
]

CARRIED = [
    pytest.param(lambda _: None, id="nothing"),
    pytest.param(lambda m: layer(m).compile(), id="compiled-layer"),
    pytest.param(call("gradient_checkpointing_enable"), id="checkpointing"),
    pytest.param(call("enable_input_require_grads"), id="input-gradients"),
    pytest.param(call("resize_token_embeddings", 103), id="resized"),
    pytest.param(call("set_attn_implementation", "eager"), id="eager"),
    pytest.param(call("half"), id="half"),
    pytest.param(call("model.layers.eval"), id="mode"),
    pytest.param(call("model.embed_tokens.requires_grad_", False), id="frozen"),
    pytest.param(set_on(ATTENTION, "attention_dropout", 0.3), id="dropout"),
    pytest.param(in_config(pad_token_id=5, eos_token_id=6, attention_dropout=0.3), id="tokens"),
    pytest.param(set_on("", "note", object()), id="note"),
    pytest.param(on_weight("model.norm.weight"), id="hook-on-a-shared-weight"),
    pytest.param(
        lambda m: m(input_ids=torch.arange(5)[None], output_hidden_states=True, output_attentions=True), id="captured"
    ),
]


def check(model):
    check_as_configured(model)
    cut_model(model, plan_for(model, SDPConfig.parse({"coverage": 0.5}), 4), 0)


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_the_full_model_would_lack_is_refused(change, words):
    model = tiny_model()
    change(model)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ModelError) as caught:
        check(model)
    assert str(caught.value).startswith("model: ")
    assert words in str(caught.value)
    assert before == {name: id(module) for name, module in model.named_modules()}, "nothing is cut"


@pytest.mark.parametrize("change", CARRIED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_does_not_change_the_full_model_is_taken(family, change):
    model = tiny_model(family)
    try:
        change(model)
    except AttributeError:
        pytest.skip("of the other family")
    check(model)


class NeedsMore(LlamaForCausalLM):
    """A model that its config alone does not make."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def test_a_model_that_cannot_be_built_again_is_refused():
    with pytest.raises(ModelError, match="NeedsMore cannot be built from its config alone"):
        check_as_configured(NeedsMore(tiny_config(), extra=1))


def test_a_subnetwork_is_refused():
    model = tiny_model()
    check(model)
    with pytest.raises(ModelError, match="not one that is a subnetwork already"):
        check_as_configured(model)


def test_a_family_loaded_from_its_folder_is_taken(tmp_path):
    for family in ("gemma", "gpt_neox"):
        tiny_model(family).save_pretrained(tmp_path / family)
        loaded = type(tiny_model(family)).from_pretrained(tmp_path / family, dtype=torch.bfloat16, device_map="cpu")
        check(loaded)
