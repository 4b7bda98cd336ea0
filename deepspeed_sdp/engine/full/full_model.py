"""The full model, out of all subnetworks: as a state dict on rank 0 and as a HuggingFace folder."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import PreTrainedModel

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.checkpoint import model_folder
from deepspeed_sdp.engine.full.gather import Access, full_parameters
from deepspeed_sdp.errors import OutputError
from deepspeed_sdp.subnetwork import Subnetwork


@torch.no_grad()
def full_state_dict(
    subnetwork: Subnetwork, access: Access, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor] | None:
    """Collective; see :meth:`SDPEngine.full_state_dict`. Other ranks than 0 never hold more than one unit space."""
    is_writer = dist.get_rank() == 0
    weights: dict[str, torch.Tensor] = {}

    for parameters in full_parameters(subnetwork, access):
        if is_writer:
            for name, value in parameters.items():
                weights[name] = value.to("cpu", dtype if value.is_floating_point() else None, copy=True)
        del parameters
    if not is_writer:
        return None
    for name, buffer in subnetwork.persistent_buffers():
        weights[name] = buffer.detach().to("cpu", copy=True)
    skeleton = subnetwork.full.skeleton
    owners = {id(p): name for name, p in skeleton.named_parameters()}
    # Tied weights stand under each of their names, as in the model's own state dict.
    names = {name: owners.get(id(p), name) for name, p in skeleton.state_dict(keep_vars=True).items()}
    return {name: weights[owner] for name, owner in names.items()}


def save_hf(subnetwork: Subnetwork, folder: Path, access: Access, dtype: torch.dtype | None = None) -> None:
    """Collective; see :meth:`SDPEngine.save_hf`."""
    weights = full_state_dict(subnetwork, access, dtype)
    from_first_rank(lambda: _write(subnetwork, folder, weights or {}))


def skeleton_to_save(subnetwork: Subnetwork, dtype: torch.dtype) -> PreTrainedModel:
    """The full model without memory; ``dtype`` is what ``save_pretrained`` writes into the config."""
    model: Any = subnetwork.full.new_skeleton().to(dtype)
    return model  # type: ignore[no-any-return]


def _write(subnetwork: Subnetwork, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    try:
        model = skeleton_to_save(subnetwork, next(iter(weights.values())).dtype)
        with model_folder(folder) as staging:
            model.save_pretrained(staging, state_dict=weights)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk gives
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"save_hf: cannot write {folder}: {reason}") from None
    except Exception as error:
        raise OutputError(f"save_hf: cannot save the model to {folder}: {type(error).__name__}: {error}") from None
