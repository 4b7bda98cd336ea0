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
        (True, {"accumulation": 2, "bucket": 4000}, "replicas", {"num_subnetworks": 2, "coverage": 0.5}),
        (True, {}, "owner_sets", {"coverage": 0.5, "comm": {"transport": "owner_sets"}}),
    )
]


@pytest.mark.parametrize(("ds", "sdp"), ROWS)
def test_bytes_sent_and_held_are_the_real_ones(ranks4, ds, sdp):
    results = ranks4.run("tests.engine.stats_cases:traffic", timeout=60, ds=ds, sdp=sdp)
    plan = SubnetworkPlan.from_json(results[0]["plan"])
    for rank, result in enumerate(results):
        stats = result["stats"]
        assert stats["subnetwork_index"] == rank * plan.num_subnetworks // 4
        check_traffic(result["seen"], stats)
        check_padding(result["buckets"], plan, ds)
        check_design(result, plan, ds, sdp)
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


def check_padding(buckets, plan, ds):
    for _, owner_set, numel, padded in buckets:
        shards = owners_of(plan, owner_set) if ds["stage"] else 4 // plan.num_subnetworks
        assert 0 <= padded - numel < 8 * shards
        assert padded % (8 * shards) == 0


def check_design(result, plan, ds, sdp):
    """Gradients of what n ranks own: 2 (n-1)/n of them all-reduced, or (n-1)/n scattered and as much gathered."""
    sent = result["stats"]["bytes_sent_by_kind"]
    reduced = sum(nbytes for kind, nbytes in sent.items() if kind.startswith("gradient"))
    gathered = sent.get("weight_gather", 0)
    accumulation = ds.get("accumulation", 1)
    is_scattered = ds["stage"] > 0 and sdp.get("comm") != {"transport": "owner_sets"}
    # Gradients travel in fp32, weights in their own dtype.
    width = 2 if ds["bf16"] else 4
    once = ring_bytes(result, plan, width)
    assert_near(
        reduced, ring_bytes(result, plan, 4), (1 if is_scattered else 2) * (accumulation if ds["stage"] >= 2 else 1)
    )
    if ds["stage"] == 0:
        assert gathered == 0
    elif ds["stage"] < 3:
        assert_near(gathered, once)
    else:
        # Forwards and backwards, in every micro-batch; what is outside of the layers and the last layer not twice.
        layers = {name.split(".layers.")[1].split(".")[0] for name in result["owned"] if ".layers." in name}
        twice = tuple(f".layers.{layer}." for layer in sorted(layers, key=int)[:-1])
        again = ring_bytes(result, plan, width, twice)
        assert_near(gathered, [one + two for one, two in zip(once, again, strict=True)], accumulation)


def ring_bytes(result, plan, width, inside=("",)):
    """What a rank sends to gather all once, ``width`` bytes each, of ``inside``: by the design, and for padding."""

    def share(owner_set, numel):
        owners = owners_of(plan, owner_set)
        return numel * width * (owners - 1) / owners

    def is_inside(name):
        return any(module in name for module in inside)

    owned = [(fragment.owner_set, value) for name, (fragment, value) in result["owned"].items() if is_inside(name)]
    padded = [bucket[1:] for bucket in result["buckets"] if is_inside(bucket[0])]
    return (
        sum(share(owner_set, value.numel()) for owner_set, value in owned),
        sum(share(owner_set, padded_numel - numel) for owner_set, numel, padded_numel in padded),
    )


def assert_near(nbytes, once, times=1):
    """``nbytes`` are ``times`` those of the design to 1 %, apart from padding."""
    design, padding = once
    assert nbytes == pytest.approx(times * (design + padding), abs=0.01 * times * design)


def owners_of(plan, owner_set, ranks=4):
    return len(plan.owner_sets[owner_set]) * ranks // plan.num_subnetworks


def check_memory(owned, stats, plan, ds, ranks):
    weight = 2 if ds["bf16"] else 4
    numels, states = 0, 0.0
    sets = {fragment.owner_set for fragment, _ in owned.values()}
    for fragment, value in owned.values():
        owners = owners_of(plan, fragment.owner_set, ranks)
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
