"""Comparing what the ranks did with the reference simulator, and the ranks with each other."""

import pytest
import torch

from deepspeed_sdp.plan import SubnetworkPlan
from tests.support import oracle
from tests.support.models import tiny_model, token_batches

LR, WEIGHT_DECAY, EPS = 1e-3, 0.1, 1e-5
SCALES = {"none": 0.0, "inverse_sqrt_coverage": 0.5, "inverse_coverage": 1.0}


def adamw(model):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY, eps=EPS
    )


def simulate(
    result,
    *,
    model=None,
    sdp=None,
    ds=None,
    family="llama",
    steps=5,
    seed=1,
    world=4,
    module=None,
    optimizer=None,
    batches=None,
):
    """Train the full model as the ranks that gave ``result`` should have: ``(full model, losses, norms)``.

    In double precision, so that what is compared holds one side's rounding alone: Adam makes much of that of small
    gradients.
    """
    plan = SubnetworkPlan.from_json(result["plan"])
    module = (module or tiny_model(family, **(model or {}))).double()
    power = SCALES[(sdp or {}).get("output_scaling", "inverse_sqrt_coverage")]
    batches = batches or token_batches(steps, world, (ds or {}).get("accumulation", 1), seed=seed)
    losses, norms = oracle.train(
        module,
        oracle.unit_owners_of(plan, blocks=(sdp or {}).get("granularity", "neuron") != "neuron"),
        plan.num_subnetworks,
        batches,
        optimizer or adamw(module),
        clip=(ds or {}).get("clip", 0.0),
        scale=lambda worker, name: _share(plan, worker, name) ** -power,
        workers=result["workers"],
        masking=(sdp or {}).get("masking", "forward"),
    )
    return module, losses, norms


def _share(plan, worker, name):
    """The share of the units of a module's kind that is due to a worker: ``K/N``, or by capacity."""
    kind = next(planned.space.kind for planned in plan.spaces if planned.space.name == name)
    owners = plan.owners_per_unit if isinstance(plan.owners_per_unit, int) else plan.owners_per_unit[kind]
    capacity = plan.worker_capacity or [1.0] * plan.num_subnetworks
    full = set()  # workers that own everything; the others share what is left in proportion
    while True:
        left = {w: c for w, c in enumerate(capacity) if w not in full}
        shares = {w: (owners - len(full)) * c / sum(left.values()) for w, c in left.items()}
        more = {w for w, share in shares.items() if share > 1.0}
        if not more:
            return shares.get(worker, 1.0)
        full |= more


def assert_like(results, simulated, tolerance=1e-5):
    """Losses and norms of every rank, and the full model of rank 0, are the simulation's."""
    module, losses, norms = simulated
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx([step[rank] for step in losses], abs=tolerance), (
            f"losses of rank {rank}"
        )
        assert result["norms"] == pytest.approx(norms, rel=tolerance), f"gradient norms of rank {rank}"
        assert result["norms"] == results[0]["norms"], "all ranks report the very same norm"
    assert_same_weights(results[0]["full"], module.state_dict(), tolerance)
    assert all(result["full"] is None for result in results[1:])


def assert_same_weights(weights, expected, tolerance):
    assert list(weights) == list(expected)
    for name, value in weights.items():
        assert value.shape == expected[name].shape, name
        difference = float((value.float() - expected[name].float()).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def assert_owners_equal(results):
    """Every fragment is held by exactly the ranks that own it, and is the same on all of them to the bit."""
    plan = SubnetworkPlan.from_json(results[0]["plan"])
    for rank, result in enumerate(results):
        for fragment, value in result["copies"].values():
            assert torch.equal(value, results[0]["full"][fragment.full_name]), (rank, fragment)
    holders = {}
    for rank, result in enumerate(results):
        for fragment, value in result["owned"].values():
            holders.setdefault(fragment, []).append((rank, value))
    for fragment, copies in holders.items():
        owners = plan.owner_sets[fragment.owner_set]
        expected = [rank for rank in range(len(results)) if results[rank]["workers"][rank] in owners]
        assert [rank for rank, _ in copies] == expected, fragment
        for rank, value in copies[1:]:
            assert torch.equal(value, copies[0][1]), f"{fragment} differs on rank {rank}"
    return plan
