"""Who owns what: unit spaces, designs and the plan. Pure data and functions, without a process group.

spaces = [UnitSpace("model.layers.0.mlp", "mlp", 0, 11008, 12288), ...]
plan = make_plan(spaces, num_subnetworks=8, owners_per_unit=4)
plan.owners("model.layers.0.mlp", 17)   # (0, 1, 2, 3)
"""

from deepspeed_sdp.plan.build import make_plan
from deepspeed_sdp.plan.designs import Design, make_design
from deepspeed_sdp.plan.placement import RankOrder, nodes_of_owners, place_workers
from deepspeed_sdp.plan.plan import SubnetworkPlan
from deepspeed_sdp.plan.units import Chunk, OwnerSet, PlannedSpace, UnitSpace

__all__ = [
    "Chunk",
    "Design",
    "OwnerSet",
    "PlannedSpace",
    "RankOrder",
    "SubnetworkPlan",
    "UnitSpace",
    "make_design",
    "make_plan",
    "nodes_of_owners",
    "place_workers",
]
