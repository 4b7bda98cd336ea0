"""What an optimizer does is found out by trying it; one that cannot step parts of weights is refused in words."""

import pytest
import torch
from torch import nn

from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY, behaviour_of, constants, state_like
from deepspeed_sdp.errors import ConfigError
from tests.support.fused_ops import Lion, fused_ops


class Stepped(torch.optim.Optimizer):
    """An optimizer whose update is a function of (optimizer, group, parameter, its place in the group)."""

    def __init__(self, params, update=None, once=None, **options):
        super().__init__(params, {"lr": 1e-3, **options})
        self.update, self.once = update, once

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if self.once is not None:
                self.once(group)
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.update(self, group, parameter, place))


def trust_ratio(_, group, parameter, place):
    return parameter.grad * parameter.norm() / parameter.grad.norm()


def decayed_by_place(_, group, parameter, place):
    return parameter.grad * 0.9**place


def of_matrices(_, group, parameter, place):
    return parameter.grad / parameter.grad.norm(dim=0) if parameter.dim() == 2 else parameter.grad.sign()


def scaled_by_group(_, group, parameter, place):
    return parameter.grad / sum(float(p.norm()) for p in group["params"])


def in_blocks(optimizer, group, parameter, place):
    optimizer.state[parameter]["state1"] = (parameter.grad * 16).clamp(-127, 127).to(torch.int8)
    return parameter.grad


def on_two_sets(optimizer, group, parameter, place):
    optimizer.state[parameter]["state1"] = torch.zeros(2, *parameter.shape)
    return parameter.grad


def by_count_of_group(_, group, parameter, place):
    return parameter.grad / group["k"] ** 0.5


def count(group):
    group["k"] = group.get("k", 0) + 1


class ScheduleFree(Stepped):
    def train(self):
        pass

    def eval(self):
        pass


class Elsewhere(Stepped):
    """Steps in hooks of its own."""

    def step(self, closure=None):
        pass


def tried(make):
    parameters = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
    with fused_ops():
        optimizer = make(parameters)
    for index, group in enumerate(optimizer.param_groups):
        group[GROUP_KEY] = index
    before = {**vars(optimizer), "groups": [dict(group) for group in optimizer.param_groups]}
    drawn = torch.get_rng_state()
    try:
        return behaviour_of(optimizer, torch.device("cpu"))
    finally:
        after = {**vars(optimizer), "groups": [dict(group) for group in optimizer.param_groups]}
        assert after.keys() == before.keys()
        assert all(after[key] is before[key] for key in after if key != "groups")
        assert after["groups"] == before["groups"]
        assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: Stepped(p, trust_ratio), "update of an element depends on others"),
        (lambda p: Stepped(p, decayed_by_place), "update of an element depends on others"),
        (lambda p: Stepped(p, of_matrices), "update of an element depends on others"),
        (lambda p: Stepped(p, scaled_by_group), "update of an element depends on others"),
        (
            lambda p: Stepped(p, in_blocks),
            "keeps 'state1' of a parameter of 4096 elements as Tensor [4096] of torch.int8",
        ),
        (lambda p: Stepped(p, on_two_sets), "keeps 'state1' of a parameter of 4096 elements as Tensor [2, 4096]"),
        (lambda p: ScheduleFree(p, decayed_by_place), "swaps weights for evaluation by train() and eval()"),
        (lambda p: Elsewhere(p), "does not update the parameters of its groups"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS cannot step flat weights (TypeError: "),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam cannot step flat weights (RuntimeError: "),
        (lambda p: torch.optim.Muon(p[:1]), "Muon cannot step flat weights (ValueError: "),
        (lambda p: torch.optim.Adafactor(p), "update of an element depends on others"),
    ],
)
def test_what_needs_more_than_an_element_is_refused(make, words):
    with pytest.raises(ConfigError) as refusal:
        tried(make)
    assert words in str(refusal.value)
    assert "takes" in str(refusal.value)


def test_an_optimizer_that_counts_calls_is_stepped_all_at_once():
    assert not tried(lambda p: Stepped(p, by_count_of_group, count)).steps_by_parts


@pytest.mark.parametrize(
    ("make", "by_element", "numbers"),
    [
        (
            lambda p: torch.optim.AdamW(p, amsgrad=True),
            {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
            {"step": torch.Tensor},
        ),
        (lambda p: torch.optim.AdamW(p, fused=True), {"exp_avg", "exp_avg_sq"}, {"step": torch.Tensor}),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), {"sum"}, {"step": torch.Tensor}),
        (lambda p: torch.optim.NAdam(p), {"exp_avg", "exp_avg_sq"}, {"step": torch.Tensor, "mu_product": torch.Tensor}),
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), {"momentum_buffer"}, {}),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)), set(), {}),
        (lambda p: Lion(p), {"exp_avg"}, {}),
        (lambda p: __import__("deepspeed").ops.adam.FusedAdam(p), {"exp_avg", "exp_avg_sq"}, {"step": int}),
        (lambda p: __import__("deepspeed").ops.lion.FusedLion(p), {"exp_avg"}, {"step": int}),
    ],
)
def test_what_is_kept_of_a_parameter_is_found(make, by_element, numbers):
    behaviour = tried(make)
    assert behaviour.steps_by_parts
    assert set(behaviour.keys(by_element=True)) == by_element
    assert {key: kept.kind for key, kept in behaviour.state[0].items() if not kept.by_element} == numbers


def test_a_number_comes_back_as_a_tensor_where_its_optimizer_had_it():
    """As fused and capturable optimizers have it on the accelerator; here another device stands for that."""

    class CountsElsewhere(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                step = state.setdefault("step", torch.zeros((), dtype=torch.float64, device="meta"))
                assert step.device.type == "meta", "a count on another device stops such an optimizer"
                step += 1

    kept = tried(lambda p: CountsElsewhere(p, lr=0.1)).state[0]["step"]
    assert not kept.by_element
    number = kept.number(7)
    assert (number.shape, number.dtype, number.device.type) == ((), torch.float64, "meta")


def test_the_clients_hooks_do_not_see_the_trial():
    calls = []

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        return optimizer

    tried(make)
    assert not calls


def test_what_a_clients_step_counts_in_place_is_not_counted_by_the_trial():
    class Counting(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            self.losses, self.seen, self.steps = [], {}, torch.zeros(())

        def step(self, closure=None):
            self.losses.append(0.0)
            self.seen["step"] = True
            self.steps += 1
            super().step(closure)

    optimizer = Counting([nn.Parameter(torch.zeros(2))])
    optimizer.param_groups[0][GROUP_KEY] = 0
    held = vars(optimizer).copy()
    behaviour_of(optimizer, torch.device("cpu"))
    assert (optimizer.losses, optimizer.seen, float(optimizer.steps)) == ([], {}, 0.0)
    assert all(value is held[key] for key, value in vars(optimizer).items())


def test_initial_state_goes_to_other_parameters_and_later_state_does_not():
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.Adagrad([parameter], initial_accumulator_value=0.5)
    made = state_like(constants(optimizer.state[parameter]), torch.zeros(5))
    assert torch.equal(made["sum"], torch.full((5,), 0.5))
    assert float(made["step"]) == 0.0
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    with pytest.raises(ConfigError, match="has state already"):
        constants(optimizer.state[parameter])
