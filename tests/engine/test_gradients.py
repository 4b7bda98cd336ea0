"""The way of a gradient on one rank, with a network that answers when the test says."""

import math

import pytest
import torch
from torch import nn

from deepspeed_sdp.engine.zero.gradients import GradientPath


class Bucket:
    """What GradientPath sees of a bucket: ``ranges`` are ``(parameter, start, stop)``."""

    def __init__(self, *ranges):
        self.ranges = ranges
        self.items = tuple(index for index, _, _ in ranges)
        self.padded_numel = sum(stop - start for _, start, stop in ranges) + 2
        self.device = torch.device("cpu")


class Network:
    """A transport whose rounds arrive when :attr:`is_fast`, or when they are waited for."""

    def __init__(self):
        self.is_fast, self.sent, self.waits = True, [], 0

    def reduce(self, buckets, flats):
        self.sent.append([flat.clone() for flat in flats])
        return Pending(self, list(flats))


class Pending:
    nbytes = 0

    def __init__(self, network, flats):
        self._network, self._flats = network, flats

    def arrives_within(self, seconds):
        self._network.waits += seconds > 0
        return self._network.is_fast

    def finish(self):
        return self._flats


def path_of(rounds, numels, **options):
    parameters = {index: nn.Parameter(torch.zeros(numel)) for index, numel in enumerate(numels)}
    network = Network()
    dtypes = {"reduce": torch.float32, "accumulate": torch.float32, **options}
    return GradientPath(rounds, parameters, network, **dtypes), network


def give(path, index, value):
    path.parameters[index].grad = value.clone()
    path.add(index)
    path.ready(index)


def test_a_hook_gives_up_waiting_once_and_the_end_of_the_backward_pass_sends_the_rest_in_order():
    path, network = path_of([[Bucket((i, 0, 1))] for i in range(6)], [1] * 6)
    network.is_fast = False
    for index in range(6):
        give(path, index, torch.tensor([float(index)]))
    assert [float(flats[0][0]) for flats in network.sent] == [0.0, 1.0], "two are under way and none arrives"
    assert network.waits == 1, "the third has waited for the first, the others not again"
    path.finish()
    assert [float(flats[0][0]) for flats in network.sent] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not path.is_half_way


def test_what_was_held_back_goes_on_with_the_next_gradient_after_an_arrival():
    path, network = path_of([[Bucket((i, 0, 1))] for i in range(5)], [1] * 5)
    network.is_fast = False
    for index in range(4):
        give(path, index, torch.ones(1))
    network.is_fast = True
    give(path, 4, torch.ones(1))
    assert len(network.sent) == 5


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
def test_a_gradient_that_is_cut_is_held_until_its_last_range_is_taken(accumulate):
    path, network = path_of([[Bucket((0, 0, 2))], [Bucket((0, 2, 5), (1, 0, 1))]], [5, 1], accumulate=accumulate)
    give(path, 0, torch.arange(5.0))
    held = path.parameters[0].grad if accumulate == torch.float32 else path.tensors()[0]
    assert held.numel() == 5
    give(path, 1, torch.tensor([9.0]))
    assert path.parameters[0].grad is None
    path.finish()
    assert [flats[0].tolist() for flats in network.sent] == [[0.0, 1.0, 0.0, 0.0], [2.0, 3.0, 4.0, 9.0, 0.0, 0.0]]
    assert sorted(tensor.numel() for tensor in path.tensors()) == [4, 6], "only averages are left"


def test_micro_batches_are_summed_in_the_asked_dtype_and_averages_too():
    path, network = path_of([[Bucket((0, 0, 1))]], [1], accumulate=torch.float64, reduce=torch.bfloat16)
    path.parameters[0].grad = torch.tensor([1.0])
    path.add(0)
    give(path, 0, torch.tensor([2.0**-30]))
    path.finish()
    assert network.sent[0][0].dtype == torch.bfloat16
    (average,) = path.averages.values()
    assert average.dtype == torch.float64


def test_the_first_bad_gradient_in_backward_order_is_named_by_its_norm():
    path, _ = path_of([[Bucket((0, 0, 2), (1, 0, 1))], [Bucket((2, 0, 1))]], [2, 1, 1])
    for index, value in enumerate([torch.ones(2), torch.tensor([math.inf]), torch.tensor([math.nan])]):
        give(path, index, value)
    path.finish()
    assert path.first_nonfinite() == (1, math.inf)
    path.clear()
    assert path.first_nonfinite() is None
    assert not path.reached
    assert not path.averages


def test_a_gradient_that_comes_twice_is_refused():
    path, _ = path_of([[Bucket((0, 0, 1))], [Bucket((1, 0, 1))]], [1, 1])
    give(path, 0, torch.ones(1))
    with pytest.raises(RuntimeError, match="gradient 0 came twice"):
        path.ready(0)


def test_a_round_of_which_a_rank_owns_nothing_waits_for_one_that_it_owns():
    path, network = path_of([[Bucket((0, 0, 1))], [], [Bucket((1, 0, 1))]], [1, 1])
    give(path, 0, torch.ones(1))
    assert len(network.sent) == 1
    give(path, 1, torch.ones(1))
    assert len(network.sent) == 3
