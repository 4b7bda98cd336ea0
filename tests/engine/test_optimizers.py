"""Every optimizer of DeepSpeed's config trains as in plain torch, and goes on from its checkpoints."""

import pytest
import torch

from tests.engine.cases import build_model
from tests.engine.optimizer_cases import ADAM, CLIENTS, OPTIMIZERS
from tests.support.compare import assert_like, assert_owners_equal, simulate
from tests.support.models import token_batches

CASES = "tests.engine.optimizer_cases"
HALF = {"coverage": 0.5}

# The others of DeepSpeed's are compiled on first use.
QUICK = ("FusedAdam", "FusedLion", "Adagrad")
# By sign: where a gradient is nearly zero, rounding decides.
BY_SIGN = ("FusedLion", "CPULion", "Rprop")


def assert_close(weights, expected, tolerance=1e-5, jumps=0.0):
    """All but a share ``jumps`` of the elements differ by less than ``tolerance``."""
    differs = [(weights[name].float() - expected[name].float()).abs() > tolerance for name in expected]
    assert sum(int(d.sum()) for d in differs) <= jumps * sum(d.numel() for d in differs)


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OPTIMIZERS]
)
@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_an_optimizer_trains_and_goes_on_from_its_checkpoint(ranks4, tmp_path, optimizer, stage):
    others = {"whole": (0, 500_000), "sharded": (3, 4000)}
    if stage == 0 and optimizer.startswith("CPU"):
        pytest.skip("DeepSpeed offloads from stage 1 on")
    if optimizer.startswith("CPU"):
        others["whole"] = (1, 500_000)
    results = ranks4.run(
        f"{CASES}:live", timeout=240, folder=str(tmp_path), optimizer=optimizer, stage=stage, others=others
    )
    assert_owners_equal(results)
    if optimizer.startswith(("Fused", "CPU")):
        assert results[0]["class"].removeprefix("DeepSpeed") == optimizer.split("-")[0]
    jumps = 0.01 if optimizer in BY_SIGN else 0.0
    module = build_model()
    batches = [*token_batches(3, 4), *token_batches(2, 4, seed=9)]
    simulated = simulate(
        results[0], module=module, optimizer=OPTIMIZERS[optimizer][2](module.parameters()), batches=batches
    )
    if not jumps:
        assert_like(results, simulated)
    assert_close(results[0]["full"], dict(module.state_dict()), jumps=jumps)
    for result in results:
        # DeepSpeed's CPU optimizers count powers of beta on from where they are, or anew.
        if optimizer.startswith("CPU"):
            assert result["same"]["losses"] == pytest.approx(result["went_on"]["losses"], abs=1e-5)
        else:
            assert [result["same"][key] for key in ("losses", "norms")] == [
                result["went_on"][key] for key in ("losses", "norms")
            ]
        for other in others:
            assert result[other]["losses"] == pytest.approx(result["went_on"]["losses"], abs=1e-3 if jumps else 1e-5)
    full = results[0]["full"]
    if not optimizer.startswith("CPU"):
        assert all(torch.equal(value, full[name]) for name, value in results[0]["same"]["full"].items())
    for other in others:
        assert_close(results[0][other]["full"], full, jumps=jumps)


@pytest.mark.parametrize("optimizer", ["FusedAdam", pytest.param("CPUAdam", marks=pytest.mark.slow)])
def test_an_optimizer_of_16_bit_training_goes_on_from_its_checkpoint(ranks4, tmp_path, optimizer):
    values = {"optimizer": optimizer, "stage": 1, "others": {}, "bf16": True}
    for result in ranks4.run(f"{CASES}:live", timeout=120, folder=str(tmp_path), **values):
        assert result["same"]["losses"] == pytest.approx(result["went_on"]["losses"], abs=1e-2)


@pytest.mark.parametrize("client", list(CLIENTS))
@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_what_groups_keep_of_their_own_comes_back(ranks4, tmp_path, client, stage):
    results = ranks4.run(f"{CASES}:live_of_client", timeout=90, folder=str(tmp_path), client=client, stage=stage)
    for result in results:
        assert result["same"]["losses"] == result["went_on"]["losses"]
        assert (
            result["same"]["counts"]
            == result["went_on"]["counts"]
            == ([5, 5] if client == "counts_calls" else [None] * 2)
        )
    full = [results[0][name]["full"] for name in ("went_on", "same")]
    assert all(torch.equal(value, full[1][name]) for name, value in full[0].items())
    module = build_model()
    inside = [p for name, p in module.named_parameters() if "layers.1." in name]
    others = [p for name, p in module.named_parameters() if "layers.1." not in name]
    expected = CLIENTS[client]([{"params": others}, {"params": inside, "lr": 3e-2}])
    batches = [*token_batches(3, 4), *token_batches(2, 4, seed=9)]
    sdp = {"coverage": 0.5, "granularity": "layer"}
    simulate(results[0]["went_on"], module=module, optimizer=expected, batches=batches, sdp=sdp)
    # At thirty times the rate of the other tests rounding is as much larger.
    assert_close(full[0], dict(module.state_dict()), tolerance=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_host_reads_the_norm_alone_and_calls_the_optimizer_once_per_portion(ranks4, stage):
    for reads, lists, calls, portions, buckets in ranks4.run(f"{CASES}:host_side_of_a_step", timeout=60, stage=stage):
        assert (reads, lists) == (0, 1)
        assert calls == portions < buckets


def test_another_implementation_of_an_optimizer_takes_its_checkpoint(ranks4, tmp_path):
    optimizer = {"type": "AdamW", "params": {**ADAM, "torch_adam": True}}
    for before, after in ranks4.run(f"{CASES}:load_into", timeout=60, folder=str(tmp_path), optimizer=optimizer):
        assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (
            {"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True}},
            "lacks 'max_exp_avg_sq', which AdamW keeps",
        ),
        ({"type": "NAdam", "params": {}}, "has the state of FusedAdam; the optimizer is NAdam"),
    ],
)
def test_an_optimizer_that_keeps_other_state_refuses_the_checkpoint(ranks4, tmp_path, optimizer, words):
    messages = ranks4.run(f"{CASES}:load_into", timeout=60, folder=str(tmp_path), optimizer=optimizer)
    assert len(set(messages)) == 1
    assert words in messages[0]


class Passing:
    """A step of plain torch passes over what is frozen, for it has no gradient."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    parameter.grad = None
        self.optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "stage", "pattern", "sdp"),
    [
        ("FusedAdam", 1, "mlp.up_proj", HALF),
        ("SGD-momentum", 2, "layers.1.", HALF),
        pytest.param("SGD-momentum", 0, "norm", {"coverage": 0.75}, marks=pytest.mark.slow),
        pytest.param("SGD-momentum", 3, "mlp.up_proj", HALF, marks=pytest.mark.slow),
        ("SGD-momentum", 1, "layers.1.", {"coverage": 0.5, "masking": "backward"}),
        pytest.param("FusedAdam", 1, "embed_tokens", {"coverage": 0.5, "granularity": "layer"}, marks=pytest.mark.slow),
    ],
)
def test_a_parameter_frozen_in_mid_run_is_not_stepped(ranks4, optimizer, stage, pattern, sdp):
    values = {"optimizer": optimizer, "stage": stage, "pattern": pattern, "sdp": sdp}
    results = ranks4.run(f"{CASES}:freeze_in_between", timeout=90, **values)
    assert_owners_equal(results)
    first, second, third = results[0]["snapshots"]
    for name, value in second.items():
        assert torch.equal(value, first[name]) == (pattern in name), name
        assert not torch.equal(third[name], value), name
    module = build_model()
    expected = Passing(OPTIMIZERS[optimizer][2](module.parameters()))
    # A count of steps is one for all parameters of a bucket, also where plain torch counts each by itself.
    phases = [(False, 1, first), (True, 2, second), (False, 3, third)]
    for is_frozen, seed, weights in phases[: 3 if optimizer.startswith("SGD") else 2]:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not (is_frozen and pattern in name))
        simulate(results[0], module=module, sdp=sdp, optimizer=expected, steps=2, seed=seed)
        assert_close(weights, dict(module.state_dict()))


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_that_freeze_differently_are_refused_on_all(ranks4, stage):
    values = {"optimizer": "FusedAdam", "stage": stage, "pattern": "layers.1.", "sdp": HALF, "only": 1}
    messages = ranks4.run(f"{CASES}:freeze_in_between", timeout=60, **values)
    assert len(set(messages)) == 1
    assert "requires_grad: model.layers.1." in messages[0]
    assert (
        "is trained on rank 0 and frozen on rank 1" in messages[0] or "frozen on rank 1 and trained on" in messages[0]
    )


def test_a_parameter_frozen_at_the_start_cannot_be_trained_later(ranks4):
    messages = ranks4.run(f"{CASES}:thaw_later", timeout=60, sdp=HALF)
    assert len(set(messages)) == 1
    assert messages[0].startswith("requires_grad: rank 0 has true for model.norm.weight, which was frozen when")


@pytest.mark.parametrize("which", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn"])
def test_trained_parameters_of_mixed_dtype_are_refused(ranks4, which):
    for message in ranks4.run(f"{CASES}:mixed_dtypes", timeout=60, which=which):
        assert message.startswith(("model: ", "rank "))
        assert which in message
        assert "is bfloat16 in a job of float32; takes trained parameters of one dtype" in message


@pytest.mark.parametrize("stage", [1, 3])
def test_other_uses_of_autograd_leave_training_right(ranks4, stage):
    # Weights at ZeRO-3 are there for one forward pass at a time.
    kinds = ["grad", "grad_first", "two_losses"] + ["two_forward_passes"] * (stage < 3)
    results = {
        kind: ranks4.run(f"{CASES}:unusual_passes", timeout=60, stage=stage, kind=kind) for kind in ("plain", *kinds)
    }
    for kind in kinds:
        for expected, result in zip(results["plain"], results[kind], strict=True):
            assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5), kind
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4), kind
        assert_close(results[kind][0]["full"], results["plain"][0]["full"])


@pytest.mark.parametrize("use", ["forward", "step"])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_use_after_a_backward_pass_that_ended_early_says_so(ranks4, stage, use):
    for messages in ranks4.run(f"{CASES}:ends_early", timeout=60, stage=stage, use=use):
        assert messages[0] == "of the user"
        assert messages[1].startswith("the last backward pass ended early, by an exception inside loss.backward()")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_was_dropped_is_not_reported(ranks4, stage):
    for message in ranks4.run(f"{CASES}:nan_that_is_dropped", timeout=60, stage=stage):
        assert "rank 1: " in message
        assert "rank 0: " not in message
