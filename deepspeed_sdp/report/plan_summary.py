"""What a plan costs and gives, before any job: the figures of ``deepspeed-sdp plan``."""

from collections import Counter
from typing import Any

from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.report.facts import parameters_per_worker


def plan_summary(
    plan: SubnetworkPlan, total_numel: int, masking: str = "forward", element_bytes: int = 2
) -> dict[str, Any]:
    """The plan's own summary, and bytes.

    Args:
        plan: the plan.
        total_numel: parameters of the full model.
        masking: with ``"backward"`` every worker holds the full model, and receives what it does not own in every step.
        element_bytes: bytes of one weight and of one gradient element.

    Returns:
        JSON data; ``bytes_per_worker``: weights that each worker owns, shared ones included;
        ``bytes_held_per_worker``: those in its memory;
        ``bytes_sent_per_step``: what each worker sends in a step of one micro-batch at ZeRO stages 0 to 2, one replica,
        ring collectives: an all-reduce of its gradients, or as much in a reduce-scatter of them and a gather of its
        weights; with backward masking also the new weights for those who do not own them;
        ``bytes_sent_per_step_dense``: the same in a job whose workers hold the full model;
        ``process_groups``: owner sets that need a group of their own; ``units``: how many of each kind.
    """
    shared = total_numel - plan.total_numel
    is_backward = masking == "backward"
    workers, owned = range(plan.num_subnetworks), parameters_per_worker(plan, total_numel)
    units = Counter[str]()
    for planned in plan.spaces:
        units[planned.space.kind] += planned.space.num_units
    owner_sets = {chunk.owner_set for planned in plan.spaces for chunk in planned.chunks}
    return {
        **plan.summary(),
        "units": dict(units),
        "parameters": total_numel,
        "partitioned_parameters": plan.total_numel,
        "masking": masking,
        "bytes_per_worker": [element_bytes * numel for numel in owned],
        "bytes_held_per_worker": [element_bytes * (total_numel if is_backward else numel) for numel in owned],
        "bytes_of_full_model": element_bytes * total_numel,
        "bytes_sent_per_step": [element_bytes * _sent(plan, worker, shared, is_backward) for worker in workers],
        "bytes_sent_per_step_dense": element_bytes * _ring(total_numel, plan.num_subnetworks),
        "process_groups": len(owner_sets - {0}),
    }


def _sent(plan: SubnetworkPlan, worker: int, shared: int, is_backward: bool) -> int:
    sent = _ring(shared, plan.num_subnetworks)
    for planned in plan.spaces:
        for chunk in plan.owned(planned.space.name, worker):
            owners = len(plan.owner_sets[chunk.owner_set])
            numel = (chunk.stop - chunk.start) * planned.space.unit_numel
            sent += _ring(numel, owners)
            if is_backward:
                sent += numel // owners * (plan.num_subnetworks - owners)
    return sent


def _ring(numel: int, ranks: int) -> int:
    return 2 * numel * (ranks - 1) // ranks


def to_text(summary: dict[str, Any]) -> str:
    """The summary for a person: one line each, bytes in readable units, imbalance in percent."""
    width = max(map(len, summary))
    return "\n".join(f"{key:<{width}}  {_readable(key, value)}" for key, value in summary.items())


def _readable(key: str, value: Any) -> str:
    if key.startswith("bytes"):
        values = value if isinstance(value, list) else [value]
        low, high = min(values), max(values)
        return _size(high) if low == high else f"{_size(low)} to {_size(high)}"
    if "imbalance" in key:
        return f"{100 * value:.2f} %"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable('', number)}" for name, number in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
