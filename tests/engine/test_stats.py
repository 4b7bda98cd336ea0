"""sdp_stats: bytes that were really sent and really held."""

import pytest

from deepspeed_sdp.plan import SubnetworkPlan

ROWS = [
    pytest.param({"stage": stage, "bf16": bf16, **extra}, sdp, id=f"stage{stage}-{'bf16' if bf16 else 'fp32'}-{name}")
    for stage in (0, 1, 2)
    for bf16, extra, name, sdp in (
        (False, {"bucket": 500}, "half", {"coverage": 0.5}),
        (True, {}, "quarter", {"coverage": 0.25}),
        (False, {"accumulation": 2}, "three_quarters", {"coverage": 0.75}),
        (True, {"accumulation": 2, "bucket": 500}, "replicas", {"num_subnetworks": 2, "owners_per_unit": 1}),
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
        check_memory(result["owned"], stats, plan, ds, ranks=4)


def check_traffic(seen, stats):
    seen = [entry for entry in seen if entry[2] > 2]  # not the flag of DeepSpeed's overflow check, one byte
    kinds = {kind for kind, _, _ in seen}
    assert not kinds & {"broadcast", "reduce"}, "a step only reduces gradients and gathers weights"
    sent = sum(nbytes for _, _, nbytes in seen)
    # Whole bytes are counted: at most one lost per collective.
    assert 0 <= sent - stats["bytes_sent"] <= len(seen)
    reduced = sum(nbytes for kind, _, nbytes in seen if kind == "all_reduce")
    by_kind = stats["bytes_sent_by_kind"]
    assert by_kind["gradient_all_reduce"] + by_kind["norm_all_reduce"] == pytest.approx(reduced, abs=len(seen))
    assert sum(by_kind.values()) == stats["bytes_sent"]


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
    # ZeRO pads every group to a multiple of 2 * owners; there are a step counter per group and a small rotary buffer.
    padding = len(sets) * 2 * ranks
    assert 0 <= held["optimizer"] - per_parameter * states <= padding * per_parameter + 4 * len(sets)
    assert 0 <= held["weights"] - weight * numels <= padding * weight + 64
    assert held["gradients"] == 0, "between steps no gradient is alive"
    assert held["total"] == held["weights"] + held["optimizer"]
