"""An adapter is input: what it says is held against the model before anything is built."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.adapters.llama import LlamaAdapter
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.errors import ConfigError, ModelError
from deepspeed_sdp.subnetwork import plan_for, trial
from tests.support.adapters import (
    ChangedBlocks,
    ChangedMLP,
    HeadsInThirds,
    NoWidths,
    OneNorm,
    PhiAdapter,
    ScaledStandIn,
    WrongStandIn,
    phi_model,
    space,
    tensor,
    use,
    without_tensor,
)
from tests.support.models import FAMILIES, OTHERS, tiny_config, tiny_model

NEURONS = {}
LAYERS = {"granularity": "layer"}
BRANCHES = {"granularity": "branch"}
BACKWARD = {"masking": "backward"}


@pytest.fixture
def using(request):
    def begin(adapter):
        request.addfinalizer(use(adapter))

    return begin


def plan(model, **sdp):
    return plan_for(model, SDPConfig.parse({"coverage": 0.5, **sdp}), 4)


@pytest.mark.parametrize("units", [NEURONS, LAYERS, BRANCHES], ids=["neurons", "layers", "branches"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_what_known_families_say_is_so(family, units):
    sizes = {"num_hidden_layers": 4}
    for masking in ("forward", "backward"):
        assert plan(tiny_model(family, meta=True, **sizes), masking=masking, **units).num_subnetworks == 4


def gelu(model):
    return tiny_model(hidden_act="gelu")


def shared_layer(model):
    model.model.layers[2] = model.model.layers[1]
    return model


def tied_weights(model):
    model.model.layers[2].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    return model


def tied_to_the_outside(model):
    model.model.layers[2].input_layernorm.weight = model.model.norm.weight
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_linear(model):
    model.model.layers[1].mlp.up_proj = Doubled(32, 53, bias=False)
    return model


def same(model):
    return model


def phi(_):
    return phi_model()


def unknown(_):
    raise AttributeError("no such thing")


MLP = "model.layers.0.mlp"
TWICE = tensor(1, name=f"{MLP}.gate_proj.weight")
SAID = [
    pytest.param(ChangedMLP(TWICE), same, NEURONS, "gate_proj.weight is in model.layers.0.mlp twice", id="twice"),
    pytest.param(
        ChangedMLP(tensor(1, name=f"{MLP}.down.weight")), same, NEURONS, f"no module {MLP}.down", id="no-linear"
    ),
    pytest.param(
        ChangedMLP(tensor(1, name=f"{MLP}.up_proj.bias")), same, NEURONS, "up_proj (Linear) has no bias", id="no-bias"
    ),
    pytest.param(
        ChangedMLP(tensor(1, name="lm_head.weight")), same, NEURONS, "of model.layers.0.mlp is outside", id="elsewhere"
    ),
    pytest.param(ChangedMLP(space(name="model.mlp")), same, NEURONS, "said to be of layer 0", id="no-module"),
    pytest.param(
        ChangedMLP(space(name="model.layers.0.self_attn", layer=0)), same, NEURONS, "listed twice", id="one-module"
    ),
    pytest.param(ChangedMLP(space(layer=1)), same, NEURONS, "model.layers.0.mlp is said to be of layer 1", id="layer"),
    pytest.param(ChangedMLP(tensor(1, width=2)), same, NEURONS, "has 53 along dimension 0; said to be 2", id="width"),
    pytest.param(ChangedMLP(tensor(1, dim=1)), same, NEURONS, "has 32 along dimension 1; said to be 1", id="dimension"),
    pytest.param(ChangedMLP(tensor(2, groups=3)), same, NEURONS, "inputs in 3 groups", id="groups"),
    pytest.param(ChangedMLP(space(num_units=52)), same, NEURONS, "for each of 52 units, which is 52", id="units"),
    pytest.param(ChangedMLP(space(unit_numel=95)), same, NEURONS, "said to be 95 parameters, and has 96", id="numel"),
    pytest.param(ChangedMLP(unknown), same, NEURONS, "AttributeError: no such thing", id="raises"),
    pytest.param(
        ChangedMLP(without_tensor(1)), same, NEURONS, "a worker that owns some units of 'mlp'", id="forgotten"
    ),
    pytest.param(WrongStandIn(), same, NEURONS, "owns no unit of 'mlp' under forward masking cannot", id="stand-in"),
    pytest.param(ScaledStandIn(), same, LAYERS, "a worker that owns some units of 'layer'", id="scaled-stand-in"),
    pytest.param(ChangedBlocks(lambda b: b[::-1]), same, BRANCHES, "comes after layer 2", id="order"),
    pytest.param(
        ChangedBlocks(lambda b: [replace(x, norms=("model.norm",)) for x in b]), same, BRANCHES, "outside", id="outside"
    ),
    pytest.param(PhiAdapter(), phi, BRANCHES, "norms of their own. Where branches share one", id="one-norm"),
    pytest.param(OneNorm(), phi, BRANCHES, "does not compute the full model without", id="one-norm-of-attention"),
    pytest.param(
        HeadsInThirds(), lambda _: tiny_model("gpt_neox"), NEURONS, "some units of 'attention'", id="other-heads"
    ),
    pytest.param(NoWidths(), lambda _: tiny_model("gpt2"), NEURONS, "some units of 'attention'", id="no-widths"),
    pytest.param(
        ChangedMLP(lambda m: replace(m, is_gated=True)), gelu, BACKWARD, "of 'mlp' under backward masking", id="gated"
    ),
    pytest.param(LlamaAdapter(), shared_layer, NEURONS, "are one parameter", id="shared-layer"),
    pytest.param(LlamaAdapter(), tied_weights, NEURONS, "are one parameter", id="tied"),
    pytest.param(LlamaAdapter(), tied_to_the_outside, NEURONS, "are one parameter", id="tied-to-the-outside"),
    pytest.param(LlamaAdapter(), other_linear, NEURONS, "up_proj is Doubled; takes torch.nn.Linear", id="other-linear"),
]


@pytest.mark.parametrize(("adapter", "change", "units", "words"), SAID)
def test_what_is_not_so_is_refused(using, adapter, change, units, words):
    using(adapter)
    with pytest.raises(ModelError, match=r"^model: adapter '") as caught:
        plan(change(tiny_model()), **units)
    assert words in str(caught.value)


@pytest.mark.parametrize("units", [NEURONS, LAYERS], ids=["neurons", "layers"])
def test_branches_that_share_a_norm_take_other_units(using, units):
    using(PhiAdapter())
    assert plan(phi_model(), **units).coverage == 0.5


@pytest.mark.parametrize(
    ("sdp", "words"),
    [
        ({"partition": ["mlp", "norm"]}, "partition: got 'norm'; takes mlp and attention in models of llama"),
        ({"granularity": "layer", "partition": ["mlp"]}, "partition: got ['mlp'] with whole layers as units"),
        ({"coverage": {"mlp": 0.5}}, "takes a number for mlp and attention"),
        ({"coverage": {"mlp": 0.5, "moe": 0.5}}, "takes a number for mlp and attention"),
    ],
)
def test_kinds_are_those_of_the_family(sdp, words):
    with pytest.raises(ConfigError) as caught:
        plan(tiny_model(meta=True), **sdp)
    assert words in str(caught.value)


class Backwards(nn.ModuleList):
    def __getitem__(self, index):
        return nn.ModuleList(list(self)[::-1]) if isinstance(index, slice) else super().__getitem__(index)


class BackwardsLlama(LlamaForCausalLM):
    """Begins with its last layer."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = Backwards(self.model.layers)


def test_layers_that_are_not_called_in_their_order_are_refused():
    with pytest.raises(ModelError, match="does not call its layers once each, in their order"):
        plan(BackwardsLlama(tiny_config()))


@pytest.mark.parametrize(
    ("name", "units", "kind"),
    [
        ("BitNet", NEURONS, "mlp"),  # a norm over all neurons
        ("DiffLlama", NEURONS, "attention"),  # pairs of heads
        ("Doge", LAYERS, "layer"),  # a weight on the residual stream
        ("GraniteSWA", NEURONS, "attention"),  # a weight per head that is in no linear
    ],
)
def test_families_that_only_look_like_llama_are_refused(name, units, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 64, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(
        ModelError, match=rf"tried on a tiny {name}ForCausalLM: a worker that owns some units of '{kind}'"
    ):
        plan(model, **units)


def test_trying_leaves_the_random_numbers_alone(monkeypatch):
    model = tiny_model("qwen2", meta=True, num_attention_heads=2, num_key_value_heads=2)
    assert find_adapter(model)
    # torch.manual_seed seeds accelerators too, which no fork_rng of the CPU brings back.
    for seed_all in ("cuda.manual_seed_all", "xpu.manual_seed_all"):
        monkeypatch.setattr(f"torch.{seed_all}", lambda seed: pytest.fail("an accelerator was seeded"))
    monkeypatch.setattr(trial, "_passed", {})
    torch.default_generator.manual_seed(3)
    plan(model)
    first = torch.rand(2)
    torch.default_generator.manual_seed(3)
    assert torch.equal(first, torch.rand(2))


def test_an_adapter_need_not_be_hashable(using):
    class Unhashable(LlamaAdapter):
        __hash__ = None

    using(Unhashable())
    assert plan(tiny_model(meta=True)).num_subnetworks == 4
