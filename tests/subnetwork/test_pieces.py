"""Convolutions, norms with running statistics, and tables, cut in pieces: what a worker computes and trains of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepspeed_sdp.adapters import Layer, PartitionedModule, PartitionedTensor
from deepspeed_sdp.adapters.base import channels_of, inputs_of, outputs_of
from deepspeed_sdp.errors import PlanError
from deepspeed_sdp.plan import Chunk, PlannedSpace, SubnetworkPlan, UnitSpace
from deepspeed_sdp.subnetwork import cut_model, materialize

CHANNELS = 7
# Worker 0 owns two pieces, worker 1 one, worker 2 nothing.
CHUNKS = (Chunk(0, 2, 1), Chunk(2, 5, 2), Chunk(5, 7, 1))
OWNED = {0: [0, 1, 5, 6], 1: [2, 3, 4]}


class Block(nn.Module):
    """A branch of two convolutions, beside a table with a column for each channel."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.table = nn.Parameter(torch.empty(1, CHANNELS))
        self.conv2 = nn.Conv2d(CHANNELS, 3, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv2(self.norm(self.conv1(x)).relu() * self.table[:, :, None, None])


class Net(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.config = SimpleNamespace()

    def forward(self, x):
        return self.blocks[0](x)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, Block):
            nn.init.normal_(module.table)


class NetAdapter:
    name = "net"
    units = {"channel": "a channel"}  # noqa: RUF012

    def layers(self, model):
        return [Layer("blocks.0", model.blocks[0])]

    def blocks(self, *_):
        return []

    def init_scale(self, *_):
        return 1.0

    def partitioned_modules(self, model, kinds, size=None):
        block, name = model.blocks[0], "blocks.0"
        tensors = (
            *outputs_of(f"{name}.conv1", block.conv1),
            *channels_of(f"{name}.norm", block.norm),
            PartitionedTensor(f"{name}.table", 1),
            *inputs_of(f"{name}.conv2", block.conv2),
        )
        return [PartitionedModule(UnitSpace(f"{name}.norm", "channel", 0, CHANNELS, 3 * 9 * 2 + 4), tensors)]


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.blocks[0].norm.running_mean.normal_()
    model.blocks[0].norm.running_var.uniform_(0.5, 2)
    return model


def cut(model, worker, **kwargs):
    space = NetAdapter().partitioned_modules(model, ())[0].space
    plan = SubnetworkPlan(3, 1, "random", 0, 1, ((0, 1, 2), (0,), (1,)), (PlannedSpace(space, CHUNKS),))
    return cut_model(model, plan, worker, adapter=NetAdapter(), output_scaling="none", **kwargs)


def silent(model, worker):
    """The full model in which what the others own adds nothing."""
    others = [unit for unit in range(CHANNELS) if unit not in OWNED[worker]]
    with torch.no_grad():
        model.blocks[0].conv2.weight[:, others] = 0
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("worker", [0, 1])
def test_forward_masking_is_the_full_model_without_the_others_channels(worker, training):
    full, x = silent(net(), worker).train(training), torch.randn(2, 3, 5, 5)
    made = cut(net(), worker)
    made.module.train(training)
    output, expected = made.module(x), full(x)
    torch.testing.assert_close(output, expected)
    output.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert_same_gradients(made, full)
    mean = made.module.blocks[0].norm.running_mean
    torch.testing.assert_close(mean, full.blocks[0].norm.running_mean[OWNED[worker]])
    assert "weight" not in vars(made.module.blocks[0].conv1)


@pytest.mark.parametrize("worker", [0, 1])
def test_backward_masking_is_the_full_model_and_trains_what_is_owned(worker):
    full, x = net(), torch.randn(2, 3, 5, 5)
    made = cut(net(), worker, masking="backward")
    output, expected = made.module(x), full(x)
    torch.testing.assert_close(output, expected)
    output.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert_same_gradients(made, full)
    assert all(made.module.get_parameter(name).grad is None for name in made.frozen)


def assert_same_gradients(made, full):
    for name, fragment in made.fragments.items():
        if name in made.frozen:
            continue
        grad = full.get_parameter(fragment.full_name).grad
        if fragment.dim is not None:
            grad = made.partitioned[fragment.full_name].part_of(grad, fragment)
        torch.testing.assert_close(made.module.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-5)


def test_a_failing_pass_leaves_nothing_behind():
    made = cut(net(), 0)
    with pytest.raises(RuntimeError):
        made.module(torch.randn(2, 4, 5, 5))
    assert "weight" not in vars(made.module.blocks[0].conv1)


def test_a_copy_is_a_model_of_its_own():
    made, x = cut(net(), 0), torch.randn(2, 3, 5, 5)
    other = copy.deepcopy(made.module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(made.module(x), silent(net(), 0)(x))


def test_who_owns_nothing_of_what_cannot_be_without_is_told():
    with pytest.raises(PlanError, match=r"worker 2 owns none of the 7 units of blocks\.0\.norm"):
        cut(net(), 2)


def test_built_on_the_meta_device_all_have_parts_of_one_model():
    values = {}
    for worker in (0, 1):
        with torch.device("meta"):
            model = Net()
        made = cut(model, worker)
        materialize(made, "cpu", seed=3)
        for name, fragment in made.fragments.items():
            value = made.module.get_parameter(name).detach()
            values.setdefault((fragment.full_name, fragment.start), value)
            torch.testing.assert_close(values[fragment.full_name, fragment.start], value, rtol=0, atol=0)
        assert torch.equal(made.module.blocks[0].norm.running_var, torch.ones(len(OWNED[worker])))
    weight = torch.cat([values["blocks.0.conv1.weight", start] for start in (0, 2, 5)])
    # The spread goes by all outputs of the convolution, not by those of a piece.
    assert weight.std() == pytest.approx((2 / (CHANNELS * 9)) ** 0.5, rel=0.2)
