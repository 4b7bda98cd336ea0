"""Passes of many batches meet at every layer: they compute what each would alone, and nothing is left behind."""

import functools
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from deepspeed_sdp.adapters import Layer
from deepspeed_sdp.engine.full.lockstep import outputs_in_step

CPU = torch.device("cpu")


class Stages(nn.Module):
    """Something stands between its layers, which return more than hidden states."""

    def __init__(self, order=(0, 1, 2)):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4 * 2**i, 4 * 2**i) for i in range(3)))
        self.between = nn.ModuleList(nn.Linear(4 * 2**i, 8 * 2**i) for i in range(2))
        self.order = order

    def forward(self, x, grown_by=1.0):
        for i in self.order:
            x = self.layers[i](x)
            if i < 2:
                x = self.between[i](x).relu() * grown_by
        if x.isnan().any():
            raise ValueError("not a number")
        return x


def named_layers(model):
    return [Layer(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]


def in_step(model, calls, seen=None):
    full = list(model.layers)

    @contextmanager
    def computing(index):
        # Weights are gathered here, from where the layers are.
        assert list(model.layers) == full
        if seen is not None:
            seen.append(index)
        yield full[index]

    return outputs_in_step(model, named_layers(model), calls, computing, CPU)


def batches(count):
    return [torch.randn(2 + i, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@torch.no_grad()
def test_each_computes_what_it_would_alone():
    model, seen = Stages(), []
    calls = [functools.partial(model, x, grown_by=1.0 + i) for i, x in enumerate(batches(5))]
    for output, call in zip(list(in_step(model, calls, seen)), calls, strict=True):
        assert torch.equal(output, call())
        assert not output.requires_grad
    assert seen == [0, 1, 2]
    assert list(in_step(model, [], seen)) == []
    assert seen == [0, 1, 2] * 2  # weights are asked for by who has no batch too


def test_modes_are_the_callers():
    model = Stages()
    call = functools.partial(model, batches(1)[0])
    assert next(iter(list(in_step(model, [call])))).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (output,) = list(in_step(model, [call]))
        assert output.dtype == call().dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["error", "order", "left"])
def test_nothing_is_left_behind(how):
    model = Stages((1, 0, 2)) if how == "order" else Stages()
    layers, threads = list(model.layers), threading.active_count()
    inputs = batches(3)
    if how == "error":
        inputs[1][:] = float("nan")
    found = in_step(model, [functools.partial(model, x) for x in inputs])
    if how == "left":
        next(found)
        found.close()
    else:
        words = "not a number" if how == "error" else "does not call its layers once each"
        with pytest.raises((ValueError, RuntimeError), match=words):
            list(found)
    assert list(model.layers) == layers
    assert threading.active_count() == threads
