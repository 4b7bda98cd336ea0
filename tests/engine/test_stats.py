"""sdp_stats: bytes that were really sent and really held."""

import pytest

from deepspeed_sdp.plan import SubnetworkPlan

ROWS = [
    pytest.param({"stage": stage, "bf16": bf16, **extra}, sdp, id=f"stage{stage}-{'bf16' if bf16 else 'fp32'}-{name}")
    for stage in (0, 1, 2, 3)
    for bf16, extra, name, sdp in (
        (False, {"bucket": 4000}, "half", {"coverage": 0.5}),
        (True, {}, "quarter", {"coverage": 0.25}),
        (False, {"accumulation": 2}, "three_quarters", {"coverage": 0.75}),
        (True, {"accumulation": 2, "bucket": 4000}, "replicas", {"num_subnetworks": 2, "owners_per_unit": 1}),
        (True, {}, "owner_sets", {"coverage": 0.5, "transport": "owner_sets"}),
    )
]


@pytest.mark.parametrize(("ds", "sdp"), ROWS)
def test_bytes_sent_and_held_are_the_real_ones(ranks4, ds, sdp):
    results = ranks4.run("tests.engine.stats_cases:traffic", timeout=60, ds=ds, sdp=sdp)
    plan = SubnetworkPlan.from_json(results[0]["plan"])
    for rank, result in enumerate(results):
        stats = result["stats"]
        assert stats["subnetwork_index"] == rank % plan.num_subnetworks
        check_traffic(result["seen"], stats)
        check_design(result["owned"], stats, plan, ds, sdp)
        check_memory(result["owned"], stats, plan, ds, ranks=4)


def check_traffic(seen, stats):
    kinds = {kind for kind, _, _ in seen}
    assert not kinds & {"broadcast", "reduce"}, "a step only reduces gradients and gathers weights"
    sent = sum(nbytes for _, _, nbytes in seen)
    # Whole bytes are counted: at most one lost per collective.
    assert 0 <= sent - stats["bytes_sent"] <= len(seen)
    assert sum(stats["bytes_sent_by_kind"].values()) == stats["bytes_sent"]
    assert sum(stats["bytes_sent_by_owner_set"].values()) == stats["bytes_sent"]
    seconds = stats["seconds"]
    assert seconds["communication"] == pytest.approx(seconds["exposed"] + seconds["overlapped"])
    assert seconds["communication"] > 0.0


def check_design(owned, stats, plan, ds, sdp):
    """Gradients of what n ranks own: 2 (n-1)/n of them all-reduced, or (n-1)/n scattered and as much gathered."""
    element = 2 if ds["bf16"] else 4
    parts = 0.0
    for fragment, value in owned.values():
        owners = len(plan.owner_sets[fragment.owner_set]) * 4 // plan.num_subnetworks
        parts += value.numel() * element * (owners - 1) / owners
    micro = ds.get("accumulation", 1) if ds["stage"] >= 2 else 1
    is_scattered = ds["stage"] > 0 and sdp.get("transport") != "owner_sets"
    reduced = sum(n for kind, n in stats["bytes_sent_by_kind"].items() if kind.startswith("gradient"))
    gathered = stats["bytes_sent_by_kind"].get("weight_gather", 0)
    # Padding: 8 elements per owner, bucket and rank; some 60 buckets.
    assert reduced == pytest.approx((1 if is_scattered else 2) * parts * micro, rel=0.05)
    if ds["stage"] in (1, 2):
        assert gathered == pytest.approx(parts, rel=0.05)
    elif ds["stage"] == 0:
        assert gathered == 0
    else:
        # Forwards and backwards, in every micro-batch; embeddings and the last layer not twice.
        passes = gathered / (parts * ds.get("accumulation", 1))
        assert 1.0 < passes < 2.0


def check_memory(owned, stats, plan, ds, ranks):
    weight = 2 if ds["bf16"] else 4
    numels, states = 0, 0.0
    sets = {fragment.owner_set for fragment, _ in owned.values()}
    for fragment, value in owned.values():
        owners = len(plan.owner_sets[fragment.owner_set]) * ranks // plan.num_subnetworks
        numels += value.numel()
        states += value.numel() / (owners if ds["stage"] else 1)
    assert stats["owned_numel"] == numels
    assert stats["owner_sets"] == sorted(sets)
    # Adam's two fp32 moments; in bf16 the fp32 master besides, in fp32 the weights are the master.
    per_parameter = 12 if ds["bf16"] else 8
    held = stats["model_state_bytes"]
    # Every bucket is padded to a multiple of 8 elements per owner and has a step counter; there is a rotary buffer.
    buckets = len(sets) * (40 if "bucket" in ds else 6)
    assert 0 <= held["optimizer"] - per_parameter * states <= buckets * (8 * per_parameter + 4)
    held_weights = states if ds["stage"] == 3 else numels
    assert 0 <= held["weights"] - weight * held_weights <= buckets * 8 * ranks * weight + 64
    assert held["gradients"] == 0, "between steps no gradient is alive"
    assert held["total"] == held["weights"] + held["optimizer"]
