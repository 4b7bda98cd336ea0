"""From a full model to one worker's subnetwork."""

from deepspeed_sdp.subnetwork.as_configured import check_as_configured
from deepspeed_sdp.subnetwork.client_map import ClientMap
from deepspeed_sdp.subnetwork.cut import cut_model
from deepspeed_sdp.subnetwork.hf_config import meta_model, read_model_config
from deepspeed_sdp.subnetwork.layout import SHARED, Fragment, FullParameter, partitioned_by_space
from deepspeed_sdp.subnetwork.materialize import is_meta, materialize
from deepspeed_sdp.subnetwork.planning import kinds_of, plan_for, unit_spaces
from deepspeed_sdp.subnetwork.recut import give_memory, graft, recut
from deepspeed_sdp.subnetwork.subnetwork import Subnetwork

__all__ = [
    "SHARED",
    "ClientMap",
    "Fragment",
    "FullParameter",
    "Subnetwork",
    "check_as_configured",
    "cut_model",
    "give_memory",
    "graft",
    "is_meta",
    "kinds_of",
    "materialize",
    "meta_model",
    "partitioned_by_space",
    "plan_for",
    "read_model_config",
    "recut",
    "unit_spaces",
]
