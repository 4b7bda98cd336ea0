"""The full model as a module to call, between steps: with all its weights on every rank, or one layer at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch import nn

from deepspeed_sdp.engine.full.evaluation import eval_mode, outputs_of
from deepspeed_sdp.engine.full.gather import Access, full_parameters
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.subnetwork import Subnetwork


@torch.no_grad()
def gather_model(subnetwork: Subnetwork, access: Access, is_sharded: bool) -> nn.Module:
    """Collective. The full model in evaluation mode, of the class and configuration it was given as.

    What this rank holds whole is not copied, unless ``is_sharded`` (ZeRO-3) takes it away again.
    """
    weights: dict[str, torch.Tensor] = {}

    for some in full_parameters(subnetwork, access):
        weights.update((name, value.clone() if is_sharded else value) for name, value in some.items())
    model = subnetwork.full.new_skeleton()
    if "_loss_function" in vars(subnetwork.module):  # the one thing a model may have beside its class and config
        model.__dict__["_loss_function"] = vars(subnetwork.module)["_loss_function"]
    owner = {id(parameter): name for name, parameter in model.named_parameters()}
    # Tied weights stand under each of their names; they stay one parameter.
    parameters = {name: nn.Parameter(weights[name], requires_grad=False) for name in owner.values()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_parameter(child, parameters[owner[id(parameter)]])
    for name, buffer in subnetwork.module.named_buffers():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._buffers[child] = buffer
    return model.eval()


class StreamedModel(nn.Module):
    """Calls the full model one gathered layer at a time; every call is collective, and takes what the model takes.

    Attributes:
        config: of the full model.
    """

    def __init__(self, subnetwork: Subnetwork, access: Access) -> None:
        super().__init__()
        self.config = subnetwork.full.config
        self._class_name = subnetwork.full.model_class.__name__
        self.main_input_name = getattr(subnetwork.module, "main_input_name", "input_ids")

        def call(inputs: dict[str, Any]) -> Any:
            inputs = {k: v.to(access.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            with eval_mode(subnetwork.module), access.readable(None):
                (output,) = outputs_of(subnetwork, [inputs], access)
            return output

        self._call = call

    def _get_name(self) -> str:
        """The full model's class, by which transformers tells what its labels mean."""
        return self._class_name

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        return self._call(inputs)


def is_too_large(subnetwork: Subnetwork, device: torch.device) -> bool:
    """Collective. Whether some rank has no memory for the full model's weights, beside what it holds.

    On CPUs the ranks of a host share its memory. A fifth is left to what evaluation takes besides.
    """
    if subnetwork.masking == "backward":
        return False
    numel = sum(parameter.numel() for parameter in subnetwork.full.skeleton.parameters())
    nbytes = numel * next(subnetwork.module.parameters()).element_size()
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = min(gather_objects(get_accelerator().available_memory(device.index) // sharers, "agreeing on an evaluation"))
    is_larger = bool(nbytes > 0.8 * free)
    if dist.get_rank() == 0:
        how = "streamed, a layer at a time" if is_larger else "gathered"
        logger.info(
            f"evaluation: {how}: the full model's weights take {nbytes / 1e9:.2f} GB of {free / 1e9:.2f} GB free"
        )
    return is_larger


@contextmanager
def whole_model(subnetwork: Subnetwork, access: Access, *, is_streamed: bool, is_sharded: bool) -> Iterator[nn.Module]:
    """Collective; see :meth:`SDPEngine.full_model`."""
    # Under backward masking every rank holds all weights: nothing is gained by streaming.
    if is_streamed and subnetwork.masking == "forward":
        yield StreamedModel(subnetwork, access)
    else:
        model = gather_model(subnetwork, access, is_sharded)
        try:
            yield model
        finally:
            # It shares memory with what is trained, which goes on.
            model.to("meta")
