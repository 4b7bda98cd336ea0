"""The plan of a model, from the SDP block."""

from torch import nn

from deepspeed_sdp.adapters import find_adapter
from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.plan import SubnetworkPlan, make_plan
from deepspeed_sdp.subnetwork.subnetwork import partitioned_modules


def plan_for(model: nn.Module, sdp: SDPConfig, world_size: int) -> SubnetworkPlan:
    """The plan of ``model`` (real or meta) under ``sdp`` on ``world_size`` ranks; a pure function.

    Raises:
        ConfigError, ModelError, PlanError: the block does not fit the world size, the model or each other.
    """
    adapter = find_adapter(model)
    num_subnetworks = sdp.subnetworks(world_size)
    modules = partitioned_modules(model, adapter, sdp.partition, sdp.shared_modules)
    plan = make_plan(
        [module.space for module in modules],
        num_subnetworks,
        owners_per_unit=sdp.owners(num_subnetworks),
        design=sdp.design,
        max_owner_sets=sdp.max_owner_sets,
        chunk_multiple=sdp.chunk_multiple,
        seed=sdp.seed,
    )
    plan.validate()
    return plan
