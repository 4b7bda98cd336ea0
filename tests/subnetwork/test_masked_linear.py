"""Layers under backward masking: dense forward passes, gradients of owned features alone, and little that is kept."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaMLP

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.report.saved_activations import saved_activations
from deepspeed_sdp.subnetwork import cut_model, plan_for
from deepspeed_sdp.subnetwork.gated_mlp import MaskedGatedMLP
from deepspeed_sdp.subnetwork.linear import LinearForm
from deepspeed_sdp.subnetwork.masked_linear import MaskedLinear
from tests.support.models import tiny_config, tiny_model


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@st.composite
def owned_ranges(draw, size=12):
    borders = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=6, unique=True)))
    ranges = [(a, b) for a, b in itertools.pairwise(borders) if draw(st.booleans())]
    return ranges or [(borders[0], borders[1])]


@settings(max_examples=60)
@given(st.sampled_from(["out", "in"]), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_gradients_are_those_of_the_dense_layer(cut, bias, is_input_kept, needs_x, data):
    torch.manual_seed(0)
    ranges = data.draw(owned_ranges())
    dense = nn.Linear(*((7, 12) if cut == "out" else (12, 7)), bias=bias)
    masked = MaskedLinear(copy.deepcopy(dense), LinearForm(cut), ranges, is_input_kept)
    x = torch.randn(2, 5, dense.in_features)
    inputs = [x.clone().requires_grad_(needs_x) for _ in range(2)]
    outputs = [layer(value) for layer, value in zip((dense, masked), inputs, strict=True)]
    assert torch.equal(*outputs)
    weight = torch.randn_like(outputs[0])
    (outputs[0] * weight).sum().backward()
    with Calls() as calls:
        (outputs[1] * weight).sum().backward()
    assert calls.counts["mm"] == 1 + needs_x, "one matmul for all ranges, one for the input"
    if needs_x:
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    dim = 0 if cut == "out" else 1
    for view, (start, stop) in zip(masked.weights, ranges, strict=True):
        expected = dense.weight.grad.narrow(dim, start, stop - start)
        torch.testing.assert_close(view.grad, expected)
        assert view.data_ptr() == masked.weight.detach().narrow(dim, start, stop - start).data_ptr(), "a view"
    assert masked.weight.grad is None
    if bias and cut == "out":
        assert masked.bias.grad is None
        for view, (start, stop) in zip(masked.biases, ranges, strict=True):
            torch.testing.assert_close(view.grad, dense.bias.grad[start:stop])
    elif bias:
        torch.testing.assert_close(masked.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranges", [((0, 20),), ((3, 9), (9, 30), (41, 53)), ()])
def test_the_gated_mlp_is_the_dense_one(bias, ranges):
    torch.manual_seed(0)
    dense = LlamaMLP(tiny_config(mlp_bias=bias)).double()
    parts = dict(copy.deepcopy(dense).named_children())
    if ranges:
        parts["down_proj"] = MaskedLinear(parts["down_proj"], LinearForm("in"), ranges)
    else:
        parts["down_proj"].requires_grad_(False)
    masked = MaskedGatedMLP(**parts)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(value) for layer, value in zip((dense, masked), inputs, strict=True)]
    assert torch.equal(*outputs)
    with torch.no_grad():
        assert torch.equal(masked(x), outputs[0])
    for output in outputs:
        (output * torch.linspace(-1, 1, 32)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-14)
    for name in ("gate_proj", "up_proj"):
        gradients = (getattr(layer, name).weight.grad for layer in (masked, dense))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    for view, (start, stop) in zip(parts["down_proj"].weights if ranges else (), ranges, strict=True):
        torch.testing.assert_close(view.grad, dense.down_proj.weight.grad[:, start:stop], rtol=1e-12, atol=1e-14)
    if bias and ranges:
        torch.testing.assert_close(parts["down_proj"].bias.grad, dense.down_proj.bias.grad)


def test_under_autocast_it_computes_what_a_linear_does():
    dense = nn.Linear(12, 7)
    masked = MaskedLinear(copy.deepcopy(dense), LinearForm("in"), [(2, 8)])
    x = torch.randn(3, 12)
    gradients = []
    for layer in (dense, masked):
        value = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(value)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        gradients.append(value.grad)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(masked.weights[0].grad, dense.weight.grad[:, 2:8], rtol=2e-2, atol=2e-2)


SIZES = {"num_hidden_layers": 4, "intermediate_size": 64, "num_key_value_heads": 8}


def kept(**sdp):
    """Bytes that autograd keeps of each layer, in tokens times hidden size, and the owned layers."""
    model = tiny_model(**SIZES)
    if sdp:
        config = SDPConfig.parse({"masking": "backward", "coverage": 0.5, **sdp})
        plan = plan_for(model, config, 4)
        cut_model(
            model,
            plan,
            0,
            masking="backward",
            block_unit=config.block_unit,
            recompute_frozen=config.backward.recompute_frozen,
        )
    ids = torch.randint(0, 97, (2, 24))
    with saved_activations(model) as saved:
        model(input_ids=ids, labels=ids)
    owned = [i for i in range(4) if sdp and any(p.requires_grad for p in model.model.layers[i].parameters())]
    return [saved.within(f"model.layers.{i}") / (4 * ids.numel() * 32) for i in range(4)], owned


def test_neuron_units_keep_no_more_than_the_dense_backward_pass_of_activations_needs():
    # In units of the residual stream: two inputs of norms, two normed inputs in fp32, two inputs of linears, queries,
    # keys, values and output of attention: 10. The MLP (twice as wide): gate, its activation, up, and product.
    dense, _ = kept()
    masked, _ = kept(granularity="neuron")
    for before, after in zip(dense, masked, strict=True):
        assert before == pytest.approx(10 + 4 * 2, abs=0.6)  # and statistics of norms and softmax
        assert before - after == pytest.approx(2 * 2, abs=0.01), "the activation and the product are computed again"


def test_frozen_blocks_keep_what_the_input_gradient_needs():
    layers, owned = kept(granularity="layer")
    assert len(owned) == 2
    for i, size in enumerate(layers):
        # Without gradients of weights: no normed inputs and no inputs of linears.
        assert size == pytest.approx(10 + 4 * 2 if i in owned else 6 + 2 * 2, abs=0.6)


def test_recomputed_blocks_keep_their_input_alone():
    layers, owned = kept(granularity="layer", backward={"recompute_frozen": True})
    assert all(size <= 1 for i, size in enumerate(layers) if i not in owned)
